// Flash attention on the CPU (FlashAttention-2, arXiv 2307.08691, for the online softmax and the backward).
//
// Queries and keys are cut into blocks that stay in the caches; every product of two blocks is
// Simd::multiply on factors packed for it:
//   rows     (row, channel)             left factor, one unit broadcast at a time
//   columns  (tile, channel, row)       right factor summed over channels, kTile rows side by side
//   depth    (row, channel)             right factor summed over rows, channels padded to whole vectors
// A unit is one element, or two neighbours along the summed axis where the processor multiplies
// bfloat16 pairs.
#include "../rope_attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <new>

#include "../bind.h"
#include "attention_mask.h"
#include "simd.h"

namespace wavflow {
namespace {

constexpr int64_t kRows = 6;         // rows of a register block
constexpr int64_t kQueries = 48;     // queries of a forward block
constexpr int64_t kKeys = 256;       // keys of a forward block
constexpr int64_t kBackQueries = 192, kBackKeys = 96;  // of a backward block

// n rows cut into as few blocks of at most `most` rows as there can be, of about the same size.
struct Cut {
  int64_t blocks, size;
  Cut(int64_t n, int64_t most)
      : blocks((n + most - 1) / most), size(round_up((n + blocks - 1) / blocks, kRows)) {}
};

// Elements of q, k, v, their gradients and the output: their type is known at run time alone, and one
// attention in float32 serves float32, bfloat16 and float16.
class Elements {
 public:
  explicit Elements(DType dtype) : dtype_(dtype) {}
  WF_HD bool is(DType dtype) const { return dtype_ == dtype; }
  WF_HD const char* at(const void* data, int64_t i) const {
    return static_cast<const char*>(data) + i * size();
  }

  // Elements [0, d) as A.
  template <class A> WF_HD void load(const void* from, int64_t d, A* __restrict to) const {
    visit<A>([=](auto type) WF_BODY {
      const auto* x = static_cast<const typename decltype(type)::type*>(from);
      for (int64_t c = 0; c < d; ++c) to[c] = A(wavflow::load(x[c]));
    });
  }
  // Elements [first, first + d) of `to`: from * factor.
  template <class A>
  WF_HD void store(const A* __restrict from, A factor, int64_t d, void* to, int64_t first) const {
    visit<A>([=](auto type) WF_BODY {
      using T = typename decltype(type)::type;
      T* x = static_cast<T*>(to) + first;
      for (int64_t c = 0; c < d; ++c) x[c] = wavflow::store<T>(from[c] * factor);
    });
  }

 private:
  WF_HD int64_t size() const { return is(DType::f64) ? 8 : is(DType::f32) ? 4 : 2; }
  template <class A, class F> WF_HD void visit(const F& f) const {
    if constexpr (std::is_same_v<A, double>) return f(Type<double>{});
    else if (is(DType::f32)) f(Type<float>{});
    else if (is(DType::bf16)) f(Type<BFloat16>{});
    else f(Type<Half>{});
  }

  DType dtype_;
};

// Memory handed out in aligned pieces: first counted, then allocated, then handed out again.
class Arena {
 public:
  template <class X> X* take(int64_t count) {
    char* piece = base_ + used_;
    used_ += round_up(count * int64_t(sizeof(X)), 64);
    return reinterpret_cast<X*>(piece);
  }
  int64_t used() const { return used_; }
  explicit Arena(char* base) : base_(base) {}

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<char, Free>;
Buffer allocate(int64_t bytes) {
  return Buffer(static_cast<char*>(::operator new(size_t(bytes), std::align_val_t(64))));
}

// Attention by products of factors F in instruction set I.
template <class F, class I>
struct Attention {
  using S = Simd<I, F>;
  using A = typename S::A;
  using U = typename S::U;
  using V = typename S::V;
  static constexpr int64_t lanes = S::lanes, pair = S::pair;
  static constexpr int kVectors = I::bytes == 64 ? 4 : 2;  // a register block is kRows x kVectors
  static constexpr int64_t kTile = kVectors * lanes;
  static_assert(kKeys % kTile == 0 && kBackQueries % kTile == 0 && kBackQueries % kRows == 0 &&
                kQueries % kRows == 0 && kBackKeys % kRows == 0 && kRows % 2 == 0);

  // Runs code that many places call: inlined, each of them would be a copy to compile.
  template <class Body> static WF_HD void apart(const Body& body) {
    I::run([&](int64_t) WF_BODY { body(); }, 0);
  }

  static WF_HD F factor(A x) {
    if constexpr (std::is_same_v<F, BFloat16>) return wavflow::store<BFloat16>(x);
    else return x;
  }

  // A row of d elements as factors: in place where that is possible, else in `row`.
  static WF_HD const F* read(Elements elements, const void* x, int64_t d, A* wide, F* row) {
    constexpr DType own = std::is_same_v<F, double>  ? DType::f64
                          : std::is_same_v<F, float> ? DType::f32
                                                     : DType::bf16;
    if (elements.is(own)) return static_cast<const F*>(x);
    if constexpr (std::is_same_v<F, A>) wide = row;
    apart([&]() WF_BODY {
      elements.load(x, d, wide);
      if constexpr (!std::is_same_v<F, A>)
        for (int64_t c = 0; c < d; ++c) row[c] = factor(wide[c]);
    });
    return row;
  }

  static WF_HD U unit(F first, F second) {
    return uint32_t(first.bits) | uint32_t(second.bits) << 16;
  }

  // Rows [begin, begin + count) of x (n, d) to `to` (count rounded up to kRows, d / pair).
  static WF_HD void pack_rows(Elements elements, const void* x, int64_t stride, int64_t begin,
                              int64_t end, int64_t d, A* wide, F* row, U* to) {
    for (int64_t n = begin; n < end; ++n, to += d / pair)
      std::memcpy(to, read(elements, elements.at(x, n * stride), d, wide, row),
                  size_t(d) * sizeof(F));
    std::memset(to, 0, size_t(round_up(end - begin, kRows) - (end - begin)) * size_t(d) * sizeof(F));
  }

  // Rows [begin, end), at most kTile of them, to one tile (d / pair, kTile).
  static WF_HD void pack_columns(Elements elements, const void* x, int64_t stride, int64_t begin,
                                 int64_t end, int64_t d, A* wide, F* row, U* to) {
    for (int64_t n = begin; n < end; ++n) {
      const F* from = read(elements, elements.at(x, n * stride), d, wide, row);
      for (int64_t p = 0; p < d / pair; ++p) std::memcpy(to + p * kTile + n - begin, from + p * pair, sizeof(U));
    }
    for (int64_t p = 0; p < d / pair; ++p)
      for (int64_t r = end - begin; r < kTile; ++r) to[p * kTile + r] = U(0);
  }

  // Rows [begin, end), then rows of zeros up to `padded`, to (padded / pair, width) units.
  static WF_HD void pack_depth(Elements elements, const void* x, int64_t stride, int64_t begin,
                               int64_t end, int64_t padded, int64_t d, int64_t width, A* wide,
                               F* row, U* to) {
    for (int64_t n = begin; n < begin + padded; n += pair, to += width) {
      if (n >= end) {
        std::memset(to, 0, size_t(width) * sizeof(U));
        continue;
      }
      if constexpr (pair == 2) {
        const F* first = static_cast<const F*>(x) + n * stride;
        const F* second = n + 1 < end ? first + stride : nullptr;
        for (int64_t c = 0; c < d; ++c) to[c] = unit(first[c], second ? second[c] : F{});
      } else {
        std::memcpy(to, read(elements, elements.at(x, n * stride), d, wide, row),
                    size_t(d) * sizeof(F));
      }
      std::memset(to + d, 0, size_t(width - d) * sizeof(U));
    }
  }

  // out (kRows, width), rows `width` apart, = out * factor + a b.
  template <int C, int64_t row, int64_t step>
  static WF_HD void add_block(A* out, int64_t width, const A* factor, const U* a, const U* b,
                              int64_t depth) {
    // Blocks are summed on their own first: the error of a long sum is that of short ones.
    V acc[kRows][C] = {};
    S::template multiply<kRows, C>(acc, a, row, step, b, width, depth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) {
        A* to = out + r * width + j * lanes;
        const V before = S::template load<V>(to);
        S::store(to, factor ? S::fma(before, S::spread(factor[r]), acc[r][j]) : before + acc[r][j]);
      }
  }
  template <int64_t row, int64_t step>
  static WF_HD void add(A* out, int64_t width, const A* factor, const U* a, const U* b,
                        int64_t depth) {
    apart([=]() WF_BODY {
      int64_t c = 0;
      for (; c + kTile <= width; c += kTile)
        add_block<kVectors, row, step>(out + c, width, factor, a, b + c, depth);
      const int64_t rest = (width - c) / lanes;
      if constexpr (kVectors == 4) {
        if (rest == 3) add_block<3, row, step>(out + c, width, factor, a, b + c, depth);
        if (rest == 2) add_block<2, row, step>(out + c, width, factor, a, b + c, depth);
      }
      if (rest == 1) add_block<1, row, step>(out + c, width, factor, a, b + c, depth);
    });
  }

  // scores (kRows, columns), rows `stride` apart, = rows a times the tiles b.
  static WF_HD void score(A* scores, int64_t stride, const U* a, const U* b, int64_t columns,
                          int64_t depth) {
    apart([=]() WF_BODY {
      for (int64_t j = 0; j < columns; j += kTile) {
        V acc[kRows][kVectors] = {};
        S::template multiply<kRows, kVectors>(acc, a, depth, 1, b + j * depth, kTile, depth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
          for (int c = 0; c < kVectors; ++c)
            S::store(scores + r * stride + j + c * lanes, acc[r][c]);
      }
    });
  }

  static WF_HD const void* head_of(Elements elements, const Heads& x, int64_t b, int64_t h) {
    return elements.at(x.data, b * x.b + h * x.h);
  }

  // Elements [first, first + d) of `to`: from * factor.
  static WF_HD void write(Elements elements, const A* from, A factor, int64_t d, void* to,
                          int64_t first) {
    apart([&]() WF_BODY { elements.store(from, factor, d, to, first); });
  }

  // Scratch of one worker in the forward.
  struct Forward {
    A *wide, *out, *scores, *top, *factor, *sums;
    F* row;
    U *queries, *weights;
    Forward(Arena& arena, int64_t d, int64_t width)
        : wide(arena.take<A>(d)), out(arena.take<A>(kQueries * width)),
          scores(arena.take<A>(kRows * kKeys)), top(arena.take<A>(kQueries)),
          factor(arena.take<A>(kRows)), sums(arena.take<A>(kQueries * lanes)),
          row(arena.take<F>(d)), queries(arena.take<U>(kQueries * d / pair)),
          weights(arena.take<U>(kRows * kKeys / pair)) {}
  };

  // The online softmax of kRows rows of scores (kRows, columns): weights from them, and top, factor
  // (what earlier sums are to be multiplied by) and sums brought up to date.
  static WF_HD void soften(const Forward& at, A* top, A* sums, int64_t columns,
                            const typename S::Exp2& exp2) {
    V most[kRows], factor[kRows], base[kRows];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) most[r] = S::spread(top[r]);
    for (int64_t c = 0; c < columns; c += lanes)
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r)
        most[r] = S::larger(S::template load<V>(at.scores + r * kKeys + c), most[r]);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      const A now = S::largest(most[r]);
      // A row that has seen no key yet has a top of minus infinity, and weights of exp(-inf).
      const A start = now == -A(INFINITY) ? A(0) : now;
      base[r] = S::spread(start);
      factor[r] = exp2(S::spread(top[r]) - base[r]);
      at.factor[r] = factor[r][0];
      top[r] = now;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const A* scores = at.scores + r * kKeys;
      F* weights = reinterpret_cast<F*>(at.weights + r * kKeys / pair);
      V sum = S::template load<V>(sums + r * lanes) * factor[r];
      for (int64_t c = 0; c < columns; c += lanes) {
        const V weight = exp2(S::template load<V>(scores + c) - base[r]);
        sum += weight;
        S::store(weights + c, S::factors(weight));
      }
      S::store(sums + r * lanes, sum);
    }
  }

  // Queries [begin, end) of one head against its packed keys (tiles) and values (depth).
  static WF_HD void attend(const RopeAttentionArgs& a, int64_t b, int64_t h, int64_t begin,
                           int64_t end, const U* keys, const U* values, int64_t width,
                           const Forward& at) {
    const int64_t d = a.d, depth = d / pair;
    const Elements elements(a.dtype);
    pack_rows(elements, head_of(elements, a.q, b, h), a.q.n, begin, end, d, at.wide, at.row,
              at.queries);
    const int64_t rows = round_up(end - begin, kRows);
    std::fill(at.out, at.out + rows * width, A(0));
    std::fill(at.sums, at.sums + rows * lanes, A(0));
    std::fill(at.top, at.top + rows, -A(INFINITY));
    const A root = A(1) / square_root(A(d)), scale = root * A(1.4426950408889634);
    const typename S::Exp2 exp2(scale);
    const Ranges ranges = visits(begin, end - 1, a.n, a.mask, kTile);
    for (int part = 0; part < kParts; ++part)
      for (int64_t j = ranges.begin[part]; j < ranges.end[part]; j += kKeys) {
        const int64_t columns = std::min(kKeys, ranges.end[part] - j);
        for (int64_t r = 0; r < rows; r += kRows) {
          score(at.scores, kKeys, at.queries + r * depth, keys + j * depth, columns, depth);
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t c = a.n - j; c < columns; ++c) at.scores[i * kKeys + c] = -INFINITY;
            hide(at.scores + i * kKeys, begin + r + i, j, j + columns, a.mask);
          }
          soften(at, at.top + r, at.sums + r * lanes, columns, exp2);
          add<kKeys / pair, 1>(at.out + r * width, width, at.factor, at.weights,
                               values + j / pair * width, columns / pair);
        }
      }
    for (int64_t i = begin, r = 0; i < end; ++i, ++r) {
      const A sum = S::sum(S::template load<V>(at.sums + r * lanes));
      const A inverse = A(1) / sum;
      write(elements, at.out + r * width, inverse, d, a.out, ((b * a.nq + i) * a.h + h) * d);
      static_cast<A*>(a.lse)[(b * a.h + h) * a.nq + i] = at.top[r] * root + std::log(sum);
    }
  }

  // Heads are taken a few at a time, so that their packed keys and values stay in the caches.
  static void forward(const RopeAttentionArgs& a) {
    const int64_t threads = std::max(a.target.threads, 1), heads = a.b * a.h;
    const int64_t width = round_up(a.d, lanes), keys = round_up(a.n, kTile), tiles = keys / kTile;
    const Cut cut(a.nq, kQueries);
    const int64_t together = std::min(4 * threads, heads), workers = threads;
    const Elements elements(a.dtype);
    auto layout = [=](Arena& arena, int64_t worker) {
      struct Layout { U *keys, *values; Forward scratch; };
      U* packed_keys = arena.take<U>(together * keys * a.d / pair);
      U* packed_values = arena.take<U>(together * keys * width / pair);
      for (int64_t w = 0; w < worker; ++w) Forward(arena, a.d, width);
      return Layout{packed_keys, packed_values, Forward(arena, a.d, width)};
    };
    Arena counted(nullptr);
    layout(counted, workers - 1);
    const Buffer buffer = allocate(counted.used());
    char* base = buffer.get();
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t count = std::min(together, heads - first);
      parallel_for(I{}, workers, a.target.threads, [=](int64_t w) WF_BODY {
        Arena arena(base);
        const auto at = layout(arena, w);
        for (int64_t i = w; i < count * tiles; i += workers) {
          const int64_t head = i / tiles, tile = i % tiles, begin = tile * kTile;
          const int64_t b = (first + head) / a.h, h = (first + head) % a.h;
          const int64_t end = std::min(begin + kTile, a.n);
          pack_columns(elements, head_of(elements, a.k, b, h), a.k.n, begin, end, a.d,
                       at.scratch.wide, at.scratch.row, at.keys + (head * keys + begin) * a.d / pair);
          pack_depth(elements, head_of(elements, a.v, b, h), a.v.n, begin, end, kTile, a.d, width,
                     at.scratch.wide, at.scratch.row, at.values + (head * keys + begin) * width / pair);
        }
      });
      parallel_for(I{}, workers, a.target.threads, [=](int64_t w) WF_BODY {
        Arena arena(base);
        const auto at = layout(arena, w);
        for (int64_t i = w; i < count * cut.blocks; i += workers) {
          const int64_t head = i / cut.blocks, begin = i % cut.blocks * cut.size;
          attend(a, (first + head) / a.h, (first + head) % a.h, begin,
                 std::min(begin + cut.size, a.nq), at.keys + head * keys * a.d / pair,
                 at.values + head * keys * width / pair, width, at.scratch);
        }
      });
    }
  }

  // Scratch of one worker in the backward. Rows are keys, columns are queries.
  struct Backward {
    A *wide, *d_k, *d_v, *scores, *d_weights;
    F* row;
    U *keys, *values, *key_depth, *weights, *d_scores, *crossed;
    Backward(Arena& arena, int64_t d, int64_t width)
        : wide(arena.take<A>(2 * d)), d_k(arena.take<A>(kBackKeys * width)),
          d_v(arena.take<A>(kBackKeys * width)), scores(arena.take<A>(kRows * kBackQueries)),
          d_weights(arena.take<A>(kRows * kBackQueries)), row(arena.take<F>(d)),
          keys(arena.take<U>(kBackKeys * d / pair)), values(arena.take<U>(kBackKeys * d / pair)),
          key_depth(arena.take<U>(kBackKeys * width / pair)),
          weights(arena.take<U>(kRows * kBackQueries / pair)),
          d_scores(arena.take<U>(kRows * kBackQueries / pair)),
          crossed(arena.take<U>(kBackKeys * kBackQueries / pair)) {}
  };

  // One head's queries and gradients as factors, and the sums of their gradients.
  struct Packed {
    U *queries, *grads, *query_depth, *grad_depth;
    A *base, *delta, *d_q;
    Packed(Arena& arena, int64_t nq, int64_t d, int64_t width, int64_t splits)
        : queries(arena.take<U>(nq * d / pair)), grads(arena.take<U>(nq * d / pair)),
          query_depth(arena.take<U>(nq * width / pair)),
          grad_depth(arena.take<U>(nq * width / pair)), base(arena.take<A>(nq)),
          delta(arena.take<A>(nq)), d_q(arena.take<A>(splits * (nq + kRows) * width)) {}
  };

  static WF_HD void pack_queries(const RopeAttentionBackwardArgs& a, int64_t b, int64_t h,
                                 int64_t begin, int64_t width, const Packed& to,
                                 const Backward& at) {
    const int64_t end = std::min(begin + kTile, a.nq), d = a.d;
    const Elements elements(a.dtype);
    const void *q = head_of(elements, a.q, b, h), *grad = head_of(elements, a.grad, b, h);
    const void* out = head_of(elements, a.out, b, h);
    const int64_t column = begin * d / pair, depth = begin * width / pair;
    pack_columns(elements, q, a.q.n, begin, end, d, at.wide, at.row, to.queries + column);
    pack_columns(elements, grad, a.grad.n, begin, end, d, at.wide, at.row, to.grads + column);
    pack_depth(elements, q, a.q.n, begin, end, kTile, d, width, at.wide, at.row,
               to.query_depth + depth);
    pack_depth(elements, grad, a.grad.n, begin, end, kTile, d, width, at.wide, at.row,
               to.grad_depth + depth);
    const A* lse = static_cast<const A*>(a.lse) + (b * a.h + h) * a.nq;
    for (int64_t i = begin; i < begin + kTile; ++i) {
      // Queries past the last have weights of exp(-inf).
      to.base[i] = i < end ? lse[i] * square_root(A(d)) : A(INFINITY);
      to.delta[i] = A(0);
      if (i >= end) continue;
      A* g = at.wide;
      A* o = at.wide + d;
      apart([&]() WF_BODY {
        elements.load(elements.at(grad, i * a.grad.n), d, g);
        elements.load(elements.at(out, i * a.out.n), d, o);
      });
      to.delta[i] = lane_sum<A>(d, [=](int64_t c) WF_BODY { return g[c] * o[c]; });
    }
  }

  // From scores and d_weights of kRows keys: weights and the scores' gradients without their scale,
  // as left factors of keys (weights, d_scores) and of queries (crossed).
  static WF_HD void differentiate(const Backward& at, U* d_scores, U* crossed, const A* base,
                                  const A* delta, int64_t columns,
                                  const typename S::Exp2& exp2) {
    for (int64_t r = 0; r < kRows; r += pair)
      for (int64_t c = 0; c < columns; c += lanes) {
        decltype(S::factors(V{})) rounded[pair];
        for (int64_t i = 0; i < pair; ++i) {
          const int64_t row = (r + i) * kBackQueries;
          const V score = S::template load<V>(at.scores + row + c);
          const V weight = exp2(score - S::template load<V>(base + c));
          const V d_weight = S::template load<V>(at.d_weights + row + c);
          rounded[i] = S::factors(weight * (d_weight - S::template load<V>(delta + c)));
          S::store(reinterpret_cast<F*>(at.weights) + row + c, S::factors(weight));
          S::store(reinterpret_cast<F*>(d_scores) + row + c, rounded[i]);
        }
        if constexpr (pair == 2)
          S::store(crossed + r / pair * kBackQueries + c, S::interleaved(rounded[0], rounded[1]));
      }
  }

  // Gradients of keys [begin, end) of one head and their part of the queries' gradients.
  static WF_HD void retreat(const RopeAttentionBackwardArgs& a, int64_t b, int64_t h, int64_t begin,
                            int64_t end, int64_t width, const Packed& from, A* d_q,
                            const Backward& at) {
    const int64_t d = a.d, depth = d / pair, rows = round_up(end - begin, kRows);
    const Elements elements(a.dtype);
    pack_rows(elements, head_of(elements, a.k, b, h), a.k.n, begin, end, d, at.wide, at.row,
              at.keys);
    pack_rows(elements, head_of(elements, a.v, b, h), a.v.n, begin, end, d, at.wide, at.row,
              at.values);
    pack_depth(elements, head_of(elements, a.k, b, h), a.k.n, begin, end, rows, d, width, at.wide,
               at.row, at.key_depth);
    std::fill(at.d_k, at.d_k + rows * width, A(0));
    std::fill(at.d_v, at.d_v + rows * width, A(0));
    const A root = A(1) / square_root(A(d)), scale = root * A(1.4426950408889634);
    const typename S::Exp2 exp2(scale);
    const Ranges ranges = visits(begin, end - 1, a.nq, a.mask, kTile);
    for (int part = 0; part < kParts; ++part)
      for (int64_t i = ranges.begin[part]; i < ranges.end[part]; i += kBackQueries) {
        const int64_t columns = std::min(kBackQueries, ranges.end[part] - i);
        for (int64_t r = 0; r < rows; r += kRows) {
          score(at.scores, kBackQueries, at.keys + r * depth, from.queries + i * depth, columns, depth);
          score(at.d_weights, kBackQueries, at.values + r * depth, from.grads + i * depth, columns, depth);
          for (int64_t j = 0; j < kRows; ++j) {
            A* scores = at.scores + j * kBackQueries;
            if (begin + r + j >= end) std::fill(scores, scores + columns, -A(INFINITY));
            hide(scores, begin + r + j, i, i + columns, a.mask);
          }
          U* crossed = at.crossed + r / pair * kBackQueries;
          U* d_scores = pair == 1 ? crossed : at.d_scores;
          differentiate(at, d_scores, crossed, from.base + i, from.delta + i, columns, exp2);
          constexpr int64_t row = kBackQueries / pair;
          add<row, 1>(at.d_v + r * width, width, nullptr, at.weights,
                      from.grad_depth + i / pair * width, columns / pair);
          add<row, 1>(at.d_k + r * width, width, nullptr, d_scores,
                      from.query_depth + i / pair * width, columns / pair);
        }
        // Whole register blocks of queries: those past the last column add nothing.
        for (int64_t j = 0; j < rows / pair; ++j)
          for (int64_t c = columns; c < round_up(columns, kRows); ++c)
            at.crossed[j * kBackQueries + c] = U(0);
        for (int64_t c = 0; c < columns; c += kRows)
          add<1, kBackQueries>(d_q + (i + c) * width, width, nullptr, at.crossed + c, at.key_depth,
                               rows / pair);
      }
    const int64_t first = ((b * a.h + h) * a.n + begin) * d;
    for (int64_t j = 0; j < end - begin; ++j) {
      write(elements, at.d_k + j * width, root, d, a.d_k, first + j * d);
      write(elements, at.d_v + j * width, A(1), d, a.d_v, first + j * d);
    }
  }

  // A head's keys are cut into a number of parts that depends on the sizes alone. Each part adds up
  // its own gradients of the queries; their sum is taken in order.
  static void backward(const RopeAttentionBackwardArgs& a) {
    const int64_t workers = std::max(a.target.threads, 1), heads = a.b * a.h;
    const int64_t width = round_up(a.d, lanes), nq = round_up(a.nq, kTile), tiles = nq / kTile;
    const Cut cut(a.n, kBackKeys);
    const int64_t splits =
        std::clamp<int64_t>(64 / std::max<int64_t>(heads, 1), 1, (cut.blocks + 3) / 4);
    const int64_t per_split = (cut.blocks + splits - 1) / splits;
    const int64_t together = std::min(4 * workers, heads);
    Arena counted(nullptr);
    Packed(counted, nq, a.d, width, splits);
    const int64_t per_head = counted.used();
    Backward(counted, a.d, width);
    const int64_t per_worker = counted.used() - per_head;
    const Buffer buffer = allocate(together * per_head + workers * per_worker);
    char *packs = buffer.get(), *scratches = packs + together * per_head;
    auto pack = [=](int64_t i) {
      Arena arena(packs + i * per_head);
      return Packed(arena, nq, a.d, width, splits);
    };
    auto scratch = [=](int64_t w) {
      Arena arena(scratches + w * per_worker);
      return Backward(arena, a.d, width);
    };
    for (int64_t first = 0; first < heads; first += together) {
      const int64_t count = std::min(together, heads - first);
      parallel_for(I{}, workers, a.target.threads, [=](int64_t w) WF_BODY {
        const Backward at = scratch(w);
        for (int64_t i = w; i < count * tiles; i += workers) {
          const int64_t at_head = first + i / tiles;
          pack_queries(a, at_head / a.h, at_head % a.h, i % tiles * kTile, width, pack(i / tiles), at);
        }
      });
      parallel_for(I{}, workers, a.target.threads, [=](int64_t w) WF_BODY {
        const Backward at = scratch(w);
        for (int64_t i = w; i < count * splits; i += workers) {
          const int64_t at_head = first + i / splits, split = i % splits;
          const Packed from = pack(i / splits);
          A* d_q = from.d_q + split * (nq + kRows) * width;
          std::fill(d_q, d_q + (nq + kRows) * width, A(0));
          const int64_t last = std::min((split + 1) * per_split, cut.blocks);
          for (int64_t block = split * per_split; block < last; ++block)
            retreat(a, at_head / a.h, at_head % a.h, block * cut.size,
                    std::min((block + 1) * cut.size, a.n), width, from, d_q, at);
        }
      });
      parallel_for(I{}, workers, a.target.threads, [=](int64_t w) WF_BODY {
        const A root = A(1) / square_root(A(a.d));
        for (int64_t i = w; i < count * a.nq; i += workers) {
          A* sum = pack(i / a.nq).d_q + i % a.nq * width;
          for (int64_t s = 1; s < splits; ++s) {
            const A* __restrict part = sum + s * (nq + kRows) * width;
            for (int64_t c = 0; c < a.d; ++c) sum[c] += part[c];
          }
          write(Elements(a.dtype), sum, root, a.d, a.d_q, (first * a.nq + i) * a.d);
        }
      });
    }
  }
};

// Calls f(Type<F>{}, I{}) for what elements are multiplied as and the instruction set in use.
template <class Call>
void dispatch_attention(DType dtype, Call&& f) {
  dispatch("rope_attention", dtype, [&](auto type) {
    using A = compute_t<typename decltype(type)::type>;
    if constexpr (std::is_same_v<typename decltype(type)::type, BFloat16>)
      if (isa() == Isa::avx512 && has_avx512_bf16()) return f(type, Avx512Bf16{});
    dispatch_isa<A, true>([&](auto isa) { f(Type<A>{}, isa); });
  });
}

}  // namespace

void rope_attention_cpu(const RopeAttentionArgs& a) {
  dispatch_attention(a.dtype, [&](auto factor, auto isa) {
    Attention<typename decltype(factor)::type, decltype(isa)>::forward(a);
  });
}

void rope_attention_backward_cpu(const RopeAttentionBackwardArgs& a) {
  dispatch_attention(a.dtype, [&](auto factor, auto isa) {
    Attention<typename decltype(factor)::type, decltype(isa)>::backward(a);
  });
}

using Strides = std::array<int64_t, 3>;
static Heads heads(uintptr_t data, Strides s) { return {pointer<void>(data), s[0], s[1], s[2]}; }

WAVFLOW_BIND(m) {
  m.def("rope_attention", [](Target target, int dtype, uintptr_t q, Strides q_strides, uintptr_t k,
                             Strides k_strides, uintptr_t v, Strides v_strides, uintptr_t out,
                             uintptr_t lse, std::array<int64_t, 5> sizes,
                             std::array<int64_t, 3> window) {
    rope_attention_cpu({target, DType(dtype), heads(q, q_strides), heads(k, k_strides),
                        heads(v, v_strides), pointer<void>(out), pointer<void>(lse), sizes[0],
                        sizes[1], sizes[2], sizes[3], sizes[4],
                        {window[0], window[1], window[2]}});
  });
  m.def("rope_attention_backward", [](Target target, int dtype, uintptr_t grad,
                                      Strides grad_strides, uintptr_t q, Strides q_strides,
                                      uintptr_t k, Strides k_strides, uintptr_t v,
                                      Strides v_strides, uintptr_t out, Strides out_strides,
                                      uintptr_t lse, uintptr_t d_q, uintptr_t d_k, uintptr_t d_v,
                                      std::array<int64_t, 5> sizes, std::array<int64_t, 3> window) {
    rope_attention_backward_cpu(
        {target, DType(dtype), heads(grad, grad_strides), heads(q, q_strides),
         heads(k, k_strides), heads(v, v_strides), heads(out, out_strides), pointer<void>(lse),
         pointer<void>(d_q), pointer<void>(d_k), pointer<void>(d_v), sizes[0], sizes[1],
         sizes[2], sizes[3], sizes[4], {window[0], window[1], window[2]}});
  });
}

}  // namespace wavflow
