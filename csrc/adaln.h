// LayerNorm without weights, shifted and scaled by rows that many tokens share; optionally of
// x + gate * y. The loops serve adaln and gated_residual_adaln, which bind them.
#pragma once

#include <memory>

#include "bind.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace wavflow {

constexpr int64_t kMaxChannels = 8192;  // MAX_CHANNELS in wavflow_kernels/ops/adaln.py
constexpr int64_t kTokens = 16;         // tokens of one unit of work, about

// A table (batch, rows, channels) with contiguous channels: shift, scale or gate.
struct RowTensor {
  uintptr_t data;
  int64_t batch_stride, row_stride;
};

// Token n reads row index[n]; the tokens of row r are offsets[r] .. offsets[r + 1] - 1. Null index:
// all tokens read row 0.
struct TokenRows {
  uintptr_t index_address, offsets_address;
  int64_t rows;

  const int32_t* index() const { return reinterpret_cast<const int32_t*>(index_address); }
  const int32_t* offsets() const { return reinterpret_cast<const int32_t*>(offsets_address); }
  WF_HD int64_t row(int64_t token) const { return index_address ? index()[token] : 0; }
  WF_HD int64_t begin(int64_t row) const { return index_address ? offsets()[row] : 0; }
  WF_HD int64_t end(int64_t row, int64_t tokens) const {
    return index_address ? offsets()[row + 1] : tokens;
  }

  // Throws unless index and offsets say the same of `tokens` tokens.
  void check(const char* op, int64_t tokens) const {
    if (!index_address) return;
    int64_t at = 0;
    for (int64_t r = 0; r <= rows; ++r) {
      const int64_t offset = offsets()[r], least = r == rows ? tokens : at;
      if (offset < least || offset > tokens || (r == 0 && offset != 0))
        throw std::invalid_argument(std::string(op) + ": offsets must rise from 0 to " +
                                    std::to_string(tokens) + ", got " + std::to_string(offset) +
                                    " at " + std::to_string(r));
      for (; at < offset; ++at)
        if (index()[at] != r - 1)
          throw std::invalid_argument(std::string(op) + ": index is " + std::to_string(index()[at]) +
                                      " at token " + std::to_string(at) +
                                      ", where offsets have row " + std::to_string(r - 1));
    }
  }
};

inline void read(Value from, RowTensor& to) {
  read_members(from, to.data, to.batch_stride, to.row_stride);
}
inline void read(Value from, TokenRows& to) {
  read_members(from, to.index_address, to.offsets_address, to.rows);
}

// Pointers are to contiguous (batch, tokens, channels) tensors. y, gate and all that belongs to them
// are null in adaln.
struct AdalnArgs {
  const char* op;
  Target target;
  DType dtype;
  uintptr_t x, y;
  RowTensor gate, shift, scale;
  TokenRows gate_rows, rows;
  uintptr_t sum, out;                 // forward
  uintptr_t grad_sum, grad;           // backward
  uintptr_t d_x, d_y;                 // backward
  uintptr_t d_gate, d_shift, d_scale; // backward, contiguous (batch, rows, channels)
  int64_t batch, tokens, channels;
  double eps;
};

// Element number `at` of a tensor that may be absent: an address, so that null has one too.
template <class T>
WF_HD T* element(uintptr_t data, int64_t at) {
  return reinterpret_cast<T*>(data + at * int64_t(sizeof(T)));
}

template <class T>
WF_HD const T* row_of(const RowTensor& table, int64_t item, int64_t row) {
  return element<const T>(table.data, item * table.batch_stride + row * table.row_stride);
}

// Asks for the row after token t's when t is the first of its row in a unit: rows of a strided table lie
// where no hardware prefetcher looks.
template <class T>
WF_HD void prefetch_next(const RowTensor& table, const TokenRows& rows, int64_t item, int64_t t,
                         int64_t unit_begin, int64_t channels) {
  const int64_t row = rows.row(t);
  if (row + 1 >= rows.rows || (t > unit_begin && rows.row(t - 1) == row)) return;
  const char* next = reinterpret_cast<const char*>(row_of<T>(table, item, row + 1));
  for (int64_t j = 0; j < channels * int64_t(sizeof(T)); j += 64) __builtin_prefetch(next + j);
}

// values[0 .. count) = x (+ gate * y), their mean and 1 / standard deviation. `values` has room for
// whole vectors.
template <bool kGated, class T, class A>
WF_HD void residual(const T* x, const T* y, const T* gate, int64_t count, A eps, A* values, A* mean,
                    A* inverse) {
  const A m = sum_lanes<A>(count, [&](int64_t j, auto lanes) WF_BODY {
    Lanes<A> v = lanes.load(x + j);
    if constexpr (kGated) v += lanes.load(gate + j) * lanes.load(y + j);
    store_lanes(values + j, v);
    return v;
  }) / A(count);
  const A squares = sum_lanes<A>(count, [&](int64_t j, auto lanes) WF_BODY {
    const Lanes<A> d = lanes.keep(load_lanes(values + j) - m);
    return d * d;
  });
  *mean = m;
  *inverse = A(1) / square_root(squares / A(count) + eps);
}

template <bool kGated, class T>
void adaln_forward(const AdalnArgs& a) {
  using A = compute_t<T>;
  a.rows.check(a.op, a.tokens);
  a.gate_rows.check(a.op, a.tokens);
  const int64_t per_item = (a.tokens + kTokens - 1) / kTokens, c = a.channels;
  parallel_for<T>(a.batch * per_item, a.target.threads, [=](int64_t unit) WF_BODY {
    const int64_t item = unit / per_item, begin = unit % per_item * kTokens;
    const int64_t end = begin + kTokens < a.tokens ? begin + kTokens : a.tokens;
    A values[kMaxChannels];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (item * a.tokens + t) * c, row = a.rows.row(t);
      prefetch_next<T>(a.shift, a.rows, item, t, begin, c);
      prefetch_next<T>(a.scale, a.rows, item, t, begin, c);
      if constexpr (kGated) prefetch_next<T>(a.gate, a.gate_rows, item, t, begin, c);
      const T* shift = row_of<T>(a.shift, item, row);
      const T* scale = row_of<T>(a.scale, item, row);
      const T* gate = row_of<T>(a.gate, item, a.gate_rows.row(t));
      T* sum = element<T>(a.sum, at);
      T* out = element<T>(a.out, at);
      A mean, inverse;
      residual<kGated>(element<const T>(a.x, at), element<const T>(a.y, at), gate, c, A(a.eps), values,
                       &mean, &inverse);
      for_lanes(c, [&](int64_t j, auto lanes) WF_BODY {
        const Lanes<A> v = load_lanes(values + j);
        if constexpr (kGated) lanes.store(sum + j, v);
        lanes.store(out + j, (v - mean) * inverse * (A(1) + lanes.load(scale + j)) + lanes.load(shift + j));
      });
    }
  });
}

// The units of work of one item in the backward: kTokens tokens each, save that a row of at most as
// many tokens belongs to one unit as a whole.
struct Units {
  TokenRows rows;
  int64_t tokens;

  WF_HD int64_t count() const { return (tokens + kTokens - 1) / kTokens; }
  WF_HD int64_t begin(int64_t unit) const {
    const int64_t at = unit * kTokens;
    if (at >= tokens) return tokens;
    const int64_t row = rows.row(at), first = rows.begin(row), end = rows.end(row, tokens);
    return first == at || end - first > kTokens ? at : end;
  }
  WF_HD int64_t of(int64_t token) const {
    const int64_t unit = token / kTokens;
    return token < begin(unit) ? unit - 1 : unit;
  }
};

// The gradient of one RowTensor. A unit of work sums over its own tokens of a row. Where it holds all
// of them, that is the gradient; else the sum goes to `edges`: slot 0 for a row that holds the unit's
// first token, slot 1 for one that starts later and goes on in the next unit.
template <class T>
struct RowGradient {
  using A = compute_t<T>;
  TokenRows rows;
  Units units;
  T* out;    // (batch, rows, channels)
  A* edges;  // (batch, units, 2, channels)
  int64_t channels;

  WF_HD A* edge(int64_t item, int64_t unit, bool starts_inside) const {
    return edges + ((item * units.count() + unit) * 2 + starts_inside) * channels;
  }
  WF_HD void write(int64_t item, int64_t row, const A* sum) const {
    T* to = out + (item * rows.rows + row) * channels;
    for_lanes(channels, [&](int64_t j, auto lanes) WF_BODY { lanes.store(to + j, lanes.load(sum + j)); });
  }

  // After token t of the unit [first, limit): where its row or the unit ends, writes the sum down and
  // clears it.
  WF_HD void finish_token(int64_t item, int64_t unit, int64_t first, int64_t limit, int64_t t,
                          A* __restrict sum) const {
    const int64_t row = rows.row(t), begin = rows.begin(row), end = rows.end(row, units.tokens);
    if (t + 1 < limit && t + 1 < end) return;
    if (begin >= first && end <= limit) {
      write(item, row, sum);
    } else {
      A* __restrict to = edge(item, unit, begin > first);
      for (int64_t j = 0; j < channels; ++j) to[j] = sum[j];
    }
    for (int64_t j = 0; j < channels; ++j) sum[j] = A(0);
  }

  // Adds the sums of the units that share a row; rows without tokens become zero.
  WF_HD void finish_row(int64_t item, int64_t row, A* __restrict sum) const {
    const int64_t begin = rows.begin(row), end = rows.end(row, units.tokens);
    const int64_t first = begin < end ? units.of(begin) : 0, last = begin < end ? units.of(end - 1) : -1;
    if (first == last) return;
    for (int64_t j = 0; j < channels; ++j) sum[j] = A(0);
    for (int64_t unit = first; unit <= last; ++unit) {
      const A* __restrict part = edge(item, unit, begin > units.begin(unit));
      for (int64_t j = 0; j < channels; ++j) sum[j] += part[j];
    }
    write(item, row, sum);
  }
};

template <bool kGated, class T>
void adaln_backward(const AdalnArgs& a) {
  using A = compute_t<T>;
  a.rows.check(a.op, a.tokens);
  a.gate_rows.check(a.op, a.tokens);
  const Units units{a.rows.index_address ? a.rows : a.gate_rows, a.tokens};
  const int64_t per_item = units.count(), c = a.channels, edges = a.batch * per_item * 2 * c;
  // Not cleared: a sum is written before it is read, and pages never touched cost nothing.
  const std::unique_ptr<A[]> scratch(new A[edges * (kGated ? 3 : 2)]);
  const auto gradient = [&](const TokenRows& rows, uintptr_t out, int which) {
    return RowGradient<T>{rows, units, reinterpret_cast<T*>(out), scratch.get() + which * edges, c};
  };
  const RowGradient<T> shift_gradient = gradient(a.rows, a.d_shift, 0);
  const RowGradient<T> scale_gradient = gradient(a.rows, a.d_scale, 1);
  const RowGradient<T> gate_gradient = gradient(a.gate_rows, a.d_gate, kGated ? 2 : 0);
  parallel_for<T>(a.batch * per_item, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t item = i / per_item, unit = i % per_item;
    const int64_t begin = units.begin(unit), end = units.begin(unit + 1);
    A normed[kMaxChannels], modulated[kMaxChannels];
    A shift_sum[kMaxChannels], scale_sum[kMaxChannels], gate_sum[kGated ? kMaxChannels : 1];
    for (int64_t j = 0; j < c; ++j) shift_sum[j] = scale_sum[j] = A(0);
    if constexpr (kGated)
      for (int64_t j = 0; j < c; ++j) gate_sum[j] = A(0);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = (item * a.tokens + t) * c;
      prefetch_next<T>(a.scale, a.rows, item, t, begin, c);
      if constexpr (kGated) prefetch_next<T>(a.gate, a.gate_rows, item, t, begin, c);
      const T* y = element<const T>(a.y, at);
      const T* grad = element<const T>(a.grad, at);
      const T* grad_sum = element<const T>(a.grad_sum, at);
      const T* scale = row_of<T>(a.scale, item, a.rows.row(t));
      const T* gate = row_of<T>(a.gate, item, a.gate_rows.row(t));
      T* d_x = element<T>(a.d_x, at);
      T* d_y = element<T>(a.d_y, at);
      A mean, inverse;
      residual<kGated>(element<const T>(a.x, at), y, gate, c, A(a.eps), normed, &mean, &inverse);
      Lanes<A> levels = {}, alongs = {};
      for_lanes(c, [&](int64_t j, auto lanes) WF_BODY {
        const Lanes<A> n = (load_lanes(normed + j) - mean) * inverse, g = lanes.load(grad + j);
        const Lanes<A> m = g * (A(1) + lanes.load(scale + j));
        store_lanes(shift_sum + j, load_lanes(shift_sum + j) + g);
        store_lanes(scale_sum + j, load_lanes(scale_sum + j) + g * n);
        store_lanes(normed + j, n);
        store_lanes(modulated + j, m);
        levels += m;
        alongs += m * n;
      });
      const A level = total<A>(levels) / A(c), along = total<A>(alongs) / A(c);
      for_lanes(c, [&](int64_t j, auto lanes) WF_BODY {
        Lanes<A> d = inverse * (load_lanes(modulated + j) - level - load_lanes(normed + j) * along);
        if constexpr (kGated) {
          d += lanes.load(grad_sum + j);
          store_lanes(gate_sum + j, load_lanes(gate_sum + j) + d * lanes.load(y + j));
          lanes.store(d_y + j, d * lanes.load(gate + j));
        }
        lanes.store(d_x + j, d);
      });
      shift_gradient.finish_token(item, unit, begin, end, t, shift_sum);
      scale_gradient.finish_token(item, unit, begin, end, t, scale_sum);
      if constexpr (kGated) gate_gradient.finish_token(item, unit, begin, end, t, gate_sum);
    }
  });
  const auto finish = [&](const RowGradient<T>& gradient) {
    const int64_t rows = gradient.rows.rows;
    parallel_for<T>(a.batch * rows, a.target.threads, [=](int64_t unit) WF_BODY {
      A sum[kMaxChannels];
      gradient.finish_row(unit / rows, unit % rows, sum);
    });
  };
  finish(shift_gradient);
  finish(scale_gradient);
  if constexpr (kGated) finish(gate_gradient);
}

}  // namespace wavflow
