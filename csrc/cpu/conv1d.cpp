// Matrix products after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (ACM TOMS 34, 2008): panels of the right factor stay in the first cache while blocks of the left
// one pass by, a register block of rows x kPanel columns at a time.
//
// Sums over the depth are cut into stretches that are summed on their own first: the error of a long
// sum is that of short ones, and neither threads nor the place of a token in a block change a bit.
#include "../conv1d.h"

#include <algorithm>
#include <memory>
#include <new>

#include "../bind.h"
#include "simd.h"

namespace wavflow {
namespace {

constexpr int64_t kDepth = 128;           // of a stretch: shorter ones err less, longer ones are faster
constexpr int64_t kStretch = 320;         // likewise, of tokens in the weight's gradient
constexpr int64_t kTokens = 192;          // of a block
constexpr int64_t kColumns = 256;         // of a block
constexpr int64_t kGradientRows = 24;     // outputs of a block of the weight's gradient
constexpr int64_t kGradientColumns = 64;  // channels of one

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

// n cut into as few parts of at most `most` as there can be, of about the same size: multiples of `of`.
struct Cut {
  int64_t parts, size;
  Cut(int64_t n, int64_t most, int64_t of)
      : parts(up(n, most)), size(up(up(n, parts), of) * of) { parts = up(n, size); }
};

struct Free {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float, Free>;
Buffer allocate(int64_t count) {
  return Buffer(static_cast<float*>(::operator new(size_t(count) * sizeof(float), std::align_val_t(64))));
}

template <class I>
struct Product {
  using S = Simd<I, float>;
  using V = typename S::V;
  static constexpr int columns = kPanel / S::lanes;  // vectors of a register block
  static constexpr int rows = I::bytes == 64 ? 12 : I::bytes == 32 ? 6 : 2;

  // out (rows, kPanel), rows `width` apart, = a b, plus what it holds (add), else plus a bias if any.
  static WF_HD void block(float* out, int64_t width, const float* a, int64_t row, int64_t step,
                          const float* b, int64_t depth, const float* bias, bool add) {
    V acc[rows][columns] = {};
    S::template multiply<rows, columns>(acc, a, row, step, b, kPanel, depth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) {
        float* to = out + r * width + j * S::lanes;
        V sum = acc[r][j];
        if (add) sum = S::template load<V>(to) + sum;
        else if (bias) sum += S::template load<V>(bias + j * S::lanes);
        S::store(to, sum);
      }
  }

  // The same where only the first `height` rows and `across` columns exist.
  static WF_HD void part(float* out, int64_t width, int64_t height, int64_t across, const float* a,
                         int64_t row, int64_t step, const float* b, int64_t depth,
                         const float* bias, bool add) {
    float tile[rows * kPanel] = {}, start[kPanel] = {};
    for (int64_t j = 0; bias && j < across; ++j) start[j] = bias[j];
    for (int64_t r = 0; add && r < height; ++r)
      for (int64_t j = 0; j < across; ++j) tile[r * kPanel + j] = out[r * width + j];
    block(tile, kPanel, a, row, step, b, depth, bias ? start : nullptr, add);
    for (int64_t r = 0; r < height; ++r)
      for (int64_t j = 0; j < across; ++j) out[r * width + j] = tile[r * kPanel + j];
  }

  // Tokens [begin, end) of item x, output channels [low, high).
  static WF_HD void tokens(const ConvArgs& a, const float* x, float* out, int64_t begin, int64_t end,
                           int64_t low, int64_t high) {
    const int64_t c = a.channels, before = a.width / 2, depth = a.width * c;
    const int64_t blocks = up(end - begin, rows), padded = (rows + a.width - 1) * c;
    auto inside = [&](int64_t t) WF_BODY { return t >= before && t + rows + before <= a.tokens; };
    // Where a block's rows begin; copies with zeros around them where windows leave the sequence.
    const float* from[kTokens / rows + 1];
    int64_t outside = 0;
    for (int64_t i = 0; i < blocks; ++i) outside += !inside(begin + i * rows);
    const Buffer copies = allocate(outside * padded);
    float* copy = copies.get();
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t t = begin + i * rows;
      if (inside(t)) {
        from[i] = x + (t - before) * c;
        continue;
      }
      from[i] = copy;
      for (int64_t n = t - before; n < t - before + rows + a.width - 1; ++n, copy += c) {
        if (n >= 0 && n < a.tokens) std::memcpy(copy, x + n * c, size_t(c) * sizeof(float));
        else std::memset(copy, 0, size_t(c) * sizeof(float));
      }
    }
    const Cut stretch(depth, kDepth, 1);
    for (int64_t p = 0; p < depth; p += stretch.size) {
      const int64_t deep = std::min(stretch.size, depth - p);
      const bool add = p > 0;
      for (int64_t j = low; j < high; j += kPanel) {
        const float* b = a.packed + j * depth + p * kPanel;
        const float* bias = a.bias && !add ? a.bias + j : nullptr;
        const int64_t across = std::min(kPanel, a.outputs - j);
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t t = begin + i * rows, height = std::min<int64_t>(rows, end - t);
          float* to = out + t * a.outputs + j;
          if (height == rows && across == kPanel)
            block(to, a.outputs, from[i] + p, c, 1, b, deep, bias, add);
          else
            part(to, a.outputs, height, across, from[i] + p, c, 1, b, deep, bias, add);
        }
      }
    }
  }
};

template <class I>
void product(I, ConvArgs a) {
  if (a.width == 1) a.tokens *= a.batch, a.batch = 1;  // no token sees another
  const Cut token(a.tokens, kTokens, Product<I>::rows), column(a.outputs, kColumns, kPanel);
  const int64_t units = token.parts * column.parts;
  parallel_for(I{}, a.batch * units, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / units, t = i % units / column.parts * token.size;
    const int64_t o = i % column.parts * column.size;
    Product<I>::tokens(a, a.x + b * a.tokens * a.channels, a.out + b * a.tokens * a.outputs, t,
                       std::min(t + token.size, a.tokens), o, std::min(o + column.size, a.outputs));
  });
}

// Channels [first, first + width) of x (tokens, channels) side by side, 0 beyond the last one.
template <int64_t width>
WF_HD void pack_tokens(const float* x, int64_t tokens, int64_t channels, int64_t first, float* to) {
  if (first + width <= channels) {
    for (int64_t n = 0; n < tokens; ++n)
      std::memcpy(to + n * width, x + n * channels + first, width * sizeof(float));
    return;
  }
  for (int64_t n = 0; n < tokens; ++n)
    for (int64_t r = 0; r < width; ++r)
      to[n * width + r] = first + r < channels ? x[n * channels + first + r] : 0;
}

// The items one after the other, as one sequence: with zeros between them that stand for what lies
// before the first and after the last token of each.
template <class I>
void weight_gradient(I, const WeightGradientArgs& a) {
  using P = Product<I>;
  constexpr int64_t rows = P::rows;
  const int64_t k = a.width, before = k / 2, item = a.tokens + before, length = a.batch * item;
  const int64_t left = up(a.outputs, rows), right = up(a.channels, kPanel);
  const int64_t left_size = length * rows, right_size = (length + 2 * before) * kPanel;
  const Buffer packed = allocate(left * left_size + right * right_size);
  float* const grads = packed.get();
  float* const seen = grads + left * left_size;
  parallel_for(I{}, left + right, a.target.threads, [=](int64_t p) WF_BODY {
    float* to = p < left ? grads + p * left_size : seen + (p - left) * right_size;
    const int64_t width = p < left ? rows : kPanel;
    const size_t gap = size_t(before * width) * sizeof(float);
    if (p >= left) {
      std::memset(to, 0, gap);
      to += before * width;
    }
    for (int64_t b = 0; b < a.batch; ++b, to += item * width) {
      if (p < left)
        pack_tokens<rows>(a.grad + b * a.tokens * a.outputs, a.tokens, a.outputs, p * rows, to);
      else
        pack_tokens<kPanel>(a.x + b * a.tokens * a.channels, a.tokens, a.channels,
                            (p - left) * kPanel, to);
      std::memset(to + a.tokens * width, 0, gap);
    }
    if (p >= left) std::memset(to, 0, gap);
  });
  const Cut row(a.outputs, kGradientRows, rows), column(a.channels, kGradientColumns, kPanel);
  const Cut stretch(length, kStretch, 1);
  parallel_for(I{}, row.parts * column.parts, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t o = i / column.parts * row.size, c = i % column.parts * column.size;
    const int64_t high = std::min(row.size, a.outputs - o), wide = std::min(column.size, a.channels - c);
    const int64_t width = up(wide, kPanel) * kPanel * k;  // of the sums: (row, panel, tap, kPanel)
    const Buffer buffer = allocate(up(high, rows) * rows * width);
    float* const sums = buffer.get();
    for (int64_t n = 0; n < length; n += stretch.size) {
      const int64_t deep = std::min(stretch.size, length - n);
      for (int64_t q = 0; q < wide; q += kPanel)
        for (int64_t j = 0; j < k; ++j)
          for (int64_t r = 0; r < high; r += rows)
            P::block(sums + r * width + (q / kPanel * k + j) * kPanel, width,
                     grads + (o + r) / rows * left_size + n * rows, 1, rows,
                     seen + (c + q) / kPanel * right_size + (n + j) * kPanel, deep, nullptr, n > 0);
    }
    for (int64_t r = 0; r < high; ++r) {
      float* to = a.out + ((o + r) * a.channels + c) * k;
      for (int64_t q = 0; q < wide; ++q)
        for (int64_t j = 0; j < k; ++j)
          to[q * k + j] = sums[r * width + (q / kPanel * k + j) * kPanel + q % kPanel];
    }
  });
}

}  // namespace

void conv1d_pack_cpu(const PackArgs& a) {
  constexpr int64_t channels = 64;  // of a block
  const int64_t panels = up(a.outputs, kPanel), blocks = up(a.channels, channels);
  parallel_for(Baseline{}, panels * blocks, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t panel = i / blocks, first = i % blocks * channels;
    const int64_t there = std::min(kPanel, a.outputs - panel * kPanel);
    const float* from = a.weight + panel * kPanel * a.output_stride;
    float* to = a.out + panel * a.width * a.channels * kPanel;
    for (int64_t q = first; q < std::min(first + channels, a.channels); ++q)
      for (int64_t j = 0; j < a.width; ++j) {
        float* row = to + (j * a.channels + q) * kPanel;
        for (int64_t r = 0; r < there; ++r)
          row[r] = from[r * a.output_stride + q * a.channel_stride + j * a.tap_stride];
        for (int64_t r = there; r < kPanel; ++r) row[r] = 0;
      }
  });
}

void conv1d_cpu(const ConvArgs& a) {
  if (a.batch == 0) return;
  dispatch_isa<float>([&](auto isa) { product(isa, a); });
}

void conv1d_weight_gradient_cpu(const WeightGradientArgs& a) {
  if (a.batch == 0)
    std::memset(a.out, 0, size_t(a.outputs * a.channels * a.width) * sizeof(float));
  else
    dispatch_isa<float>([&](auto isa) { weight_gradient(isa, a); });
}

WAVFLOW_BIND(m) {
  m.set("conv1d_panel", kPanel);
  m.def("conv1d_pack", [](Target target, uintptr_t weight, int64_t output_stride,
                          int64_t channel_stride, int64_t tap_stride, uintptr_t out,
                          int64_t outputs, int64_t channels, int64_t width) {
    conv1d_pack_cpu({target, pointer<float>(weight), output_stride, channel_stride, tap_stride,
                     pointer<float>(out), outputs, channels, width});
  });
  m.def("conv1d", [](Target target, uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t out,
                     int64_t batch, int64_t tokens, int64_t channels, int64_t outputs,
                     int64_t width) {
    conv1d_cpu({target, pointer<float>(x), pointer<float>(packed), pointer<float>(bias),
                pointer<float>(out), batch, tokens, channels, outputs, width});
  });
  m.def("conv1d_weight_gradient", [](Target target, uintptr_t grad, uintptr_t x, uintptr_t out,
                                     int64_t batch, int64_t tokens, int64_t channels,
                                     int64_t outputs, int64_t width) {
    conv1d_weight_gradient_cpu({target, pointer<float>(grad), pointer<float>(x),
                                pointer<float>(out), batch, tokens, channels, outputs, width});
  });
}

}  // namespace wavflow
