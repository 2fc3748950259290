#include "../qkv_rope.h"

#include <algorithm>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

// A block is this many tokens of one item and stream.
constexpr int64_t kTokens = 16;

// Parts are split and merged as words of at least 32 bits, this many channels at a time: compilers
// know how to permute vectors of those, not of 16-bit elements.
constexpr int64_t kChannels = 64;

template <class T> struct Raw {  // BFloat16 and Half
  using Word = uint32_t;
  static WF_HD Word bits(T x) { return x.bits; }
  static WF_HD T value(Word w) { return T{uint16_t(w)}; }
};
template <> struct Raw<float> {
  using Word = float;
  static WF_HD float bits(float x) { return x; }
  static WF_HD float value(float x) { return x; }
};
template <> struct Raw<double> {
  using Word = double;
  static WF_HD double bits(double x) { return x; }
  static WF_HD double value(double x) { return x; }
};

struct QkvRopeBlock {
  int64_t stream, item, begin, end;  // tokens [begin, end) of the stream
  int64_t offset;                    // of the stream among all tokens
};

// One head of one token: parts of x in buffers, and where the head goes. D: d, or 0 for any.
template <class T, int D>
struct QkvRopeHead {
  using A = compute_t<T>;
  using Word = typename Raw<T>::Word;
  const int64_t d;

  // x (d, J) to its first J - 1 parts as rows of `parts` (J - 1, d); the last one to v, where wanted.
  template <int J>
  WF_HD void split(const T* __restrict x, A* __restrict parts, T* __restrict v) const {
    const int64_t n = D ? D : d;
    for (int64_t begin = 0; begin < n; begin += kChannels) {
      const int64_t m = D == kChannels || n - begin > kChannels ? kChannels : n - begin;
      Word in[J * kChannels], out[J * kChannels];
      for (int64_t i = 0; i < J * m; ++i) in[i] = Raw<T>::bits(x[J * begin + i]);
      for (int64_t i = 0; i < m; ++i)
        for (int j = 0; j < J; ++j) out[j * kChannels + i] = in[J * i + j];
      for (int j = 0; j < J - 1; ++j)
        for (int64_t i = 0; i < m; ++i)
          parts[j * n + begin + i] = load(Raw<T>::value(out[j * kChannels + i]));
      if (!v) continue;
      for (int64_t i = 0; i < m; ++i) v[begin + i] = Raw<T>::value(out[(J - 1) * kChannels + i]);
    }
  }

  // The way back.
  template <int J>
  WF_HD void merge(const A* __restrict parts, const T* __restrict v, T* __restrict x) const {
    const int64_t n = D ? D : d;
    for (int64_t begin = 0; begin < n; begin += kChannels) {
      const int64_t m = D == kChannels || n - begin > kChannels ? kChannels : n - begin;
      Word in[J * kChannels], out[J * kChannels];
      for (int j = 0; j < J - 1; ++j)
        for (int64_t i = 0; i < m; ++i)
          in[j * kChannels + i] = Raw<T>::bits(store<T>(parts[j * n + begin + i]));
      for (int64_t i = 0; i < m; ++i) in[(J - 1) * kChannels + i] = Raw<T>::bits(v[begin + i]);
      for (int64_t i = 0; i < m; ++i)
        for (int j = 0; j < J; ++j) out[J * i + j] = in[j * kChannels + i];
      for (int64_t i = 0; i < J * m; ++i) x[J * begin + i] = Raw<T>::value(out[i]);
    }
  }

  // A token's rotation as factors of a channel and of the other of its pair: (a, b) becomes
  // (a c + b s, b c' + a s'). With the signs in s it holds no subtraction: GCC 12 contracts alternating
  // subtractions and additions of products to fused ones even under -ffp-contract=off.
  WF_HD void turn(const A* __restrict rope, A sign, A* __restrict cosine, A* __restrict sine) const {
    const int64_t n = D ? D : d;
    for (int64_t i = 0; i < n; i += 2) {
      cosine[i] = cosine[i + 1] = rope[i];
      sine[i] = -sign * rope[i + 1];
      sine[i + 1] = sign * rope[i + 1];
    }
  }

  WF_HD A inverse_rms(const A* x) const {
    const int64_t n = D ? D : d;
    return qkv_rope_inverse_rms(lane_sum<A>(n, [=](int64_t i) WF_BODY { return x[i] * x[i]; }), n);
  }

  WF_HD void forward(A* __restrict x, const A* __restrict weight, const A* __restrict cosine,
                     const A* __restrict sine, T* __restrict out) const {
    const int64_t n = D ? D : d;
    const A inverse = inverse_rms(x);
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] * inverse * weight[i];
    for (int64_t i = 0; i < n; i += 2) {
      out[i] = store<T>(x[i] * cosine[i] + x[i + 1] * sine[i]);
      out[i + 1] = store<T>(x[i + 1] * cosine[i + 1] + x[i] * sine[i + 1]);
    }
  }

  // x becomes its gradient, d_weight grows by its own; g is room for d values.
  WF_HD void backward(const T* __restrict grad, A* __restrict x, const A* __restrict weight,
                      const A* __restrict cosine, const A* __restrict sine, A* __restrict d_weight,
                      A* __restrict g) const {
    const int64_t n = D ? D : d;
    const A inverse = inverse_rms(x);
    for (int64_t i = 0; i < n; i += 2) {
      const A a = load(grad[i]), b = load(grad[i + 1]);
      g[i] = a * cosine[i] + b * sine[i];
      g[i + 1] = b * cosine[i + 1] + a * sine[i + 1];
    }
    for (int64_t i = 0; i < n; ++i) {
      x[i] *= inverse;
      d_weight[i] += g[i] * x[i];
      g[i] *= weight[i];
    }
    const A mean = lane_sum<A>(n, [=](int64_t i) WF_BODY { return g[i] * x[i]; }) / A(n);
    for (int64_t i = 0; i < n; ++i) x[i] = inverse * (g[i] - x[i] * mean);
  }
};

constexpr int kRows = 5;  // of d values that a block works in: q, k, gradient, cosine, sine

// J is a template argument so that every row of `fixed` has a known place: the backward took up to
// twice as long where one copy of this served both.
template <class T, int D, int J>
WF_HD void run_block(const QkvRopeArgs& a, const QkvRopeBlock& block, int64_t queries, int64_t tokens,
                     compute_t<T>* scratch, compute_t<T>* partial) {
  using A = compute_t<T>;
  const QkvRopeStream& s = a.streams[block.stream];
  const QkvRopeHead<T, D> head{a.d};
  const int64_t d = D ? D : a.d, row = a.heads * d * J;
  const A* q_weight = static_cast<const A*>(s.q_weight);
  const A* k_weight = static_cast<const A*>(s.k_weight);
  A fixed[D ? kRows * D : 1];
  A* parts = D ? fixed : scratch;
  A* k_part = parts + (J - 2) * d;
  A* g = parts + 2 * d;
  A* cosine = parts + 3 * d;
  A* sine = parts + 4 * d;
  for (int64_t n = block.begin; n < block.end; ++n) {
    const int64_t at = block.offset + n;
    const T* x = static_cast<const T*>(s.x) + block.item * s.batch_stride + n * s.token_stride;
    head.turn(static_cast<const A*>(a.rope) + at * d, a.backward ? A(-1) : A(1), cosine, sine);
    for (int64_t h = 0; h < a.heads; ++h) {
      const int64_t group = block.item * a.heads + h;
      T* q = static_cast<T*>(a.q) + (group * queries + at) * d;
      T* k = static_cast<T*>(a.k) + (group * tokens + at) * d;
      T* v = static_cast<T*>(a.v) + (group * tokens + at) * d;
      head.template split<J>(x + h * d * J, parts, a.backward ? nullptr : v);
      if (!a.backward) {
        if (J == 3) head.forward(parts, q_weight, cosine, sine, q);
        head.forward(k_part, k_weight, cosine, sine, k);
      } else {
        if (J == 3) head.backward(q, parts, q_weight, cosine, sine, partial, g);
        head.backward(k, k_part, k_weight, cosine, sine, partial + d, g);
        const int64_t out = (block.item * s.tokens + n) * row + h * d * J;
        head.template merge<J>(parts, v, static_cast<T*>(s.d_x) + out);
      }
    }
  }
}

template <class T, int D>
static void run(const QkvRopeArgs& a) {
  using A = compute_t<T>;
  std::vector<QkvRopeBlock> list;
  int64_t queries = 0, tokens = 0;
  for (size_t i = 0; i < a.streams.size(); ++i) {
    const QkvRopeStream& s = a.streams[i];
    for (int64_t item = 0; item < a.batch; ++item)
      for (int64_t begin = 0; begin < s.tokens; begin += kTokens)
        list.push_back({int64_t(i), item, begin, std::min(begin + kTokens, s.tokens), tokens});
    if (s.parts == 3) queries += s.tokens;
    tokens += s.tokens;
  }
  const int64_t count = int64_t(list.size()), d = a.d;
  std::vector<A> rooms(D ? 0 : count * kRows * d);
  std::vector<A> partials(a.backward ? count * 2 * d : 0);
  const QkvRopeArgs* args = &a;
  const QkvRopeBlock* blocks = list.data();
  A* room = rooms.data();
  A* partial = partials.data();
  parallel_for<T>(count, a.target.threads, [=](int64_t i) WF_BODY {
    A* scratch = D ? nullptr : room + i * kRows * d;
    A* sums = args->backward ? partial + i * 2 * d : nullptr;
    if (args->streams[blocks[i].stream].parts == 3)
      run_block<T, D, 3>(*args, blocks[i], queries, tokens, scratch, sums);
    else
      run_block<T, D, 2>(*args, blocks[i], queries, tokens, scratch, sums);
  });
  if (!a.backward) return;
  // Weight gradients: the blocks' partial sums in their order.
  std::vector<double> sums(a.streams.size() * 2 * d, 0.0);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < 2 * d; ++j) sums[list[i].stream * 2 * d + j] += double(partials[i * 2 * d + j]);
  for (size_t i = 0; i < a.streams.size(); ++i)
    for (int64_t j = 0; j < d; ++j) {
      static_cast<A*>(a.streams[i].d_q_weight)[j] = A(sums[i * 2 * d + j]);
      static_cast<A*>(a.streams[i].d_k_weight)[j] = A(sums[i * 2 * d + d + j]);
    }
}

void qkv_rope_cpu(const QkvRopeArgs& a) {
  dispatch("qkv_rope", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (in_every_isa<T>)
      if (a.d == 64) return run<T, 64>(a);
    run<T, 0>(a);
  });
}

static void read(Value from, QkvRopeStream& to) {
  uintptr_t x, q_weight, k_weight, d_x, d_q_weight, d_k_weight;
  read_members(from, x, q_weight, k_weight, d_x, d_q_weight, d_k_weight, to.tokens, to.parts,
               to.batch_stride, to.token_stride);
  to.x = pointer<void>(x), to.d_x = pointer<void>(d_x);
  to.q_weight = pointer<void>(q_weight), to.k_weight = pointer<void>(k_weight);
  to.d_q_weight = pointer<void>(d_q_weight), to.d_k_weight = pointer<void>(d_k_weight);
}

WAVFLOW_BIND(m) {
  m.def("qkv_rope", [](Target target, int dtype, bool backward, std::vector<QkvRopeStream> streams,
                       uintptr_t rope, uintptr_t q, uintptr_t k, uintptr_t v, int64_t batch,
                       int64_t heads, int64_t d) {
    qkv_rope_cpu({target, DType(dtype), backward, streams, pointer<void>(rope), pointer<void>(q),
                  pointer<void>(k), pointer<void>(v), batch, heads, d});
  });
}

}  // namespace wavflow
