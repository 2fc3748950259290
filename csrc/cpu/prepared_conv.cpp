#include "../prepared_conv.h"

#include <array>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

constexpr int64_t kPairs = 8;       // of tokens, a block
constexpr int64_t kChannels = 128;  // at a time, in buffers: loops of few streams are vectorised

template <class T>
static void weight(const WinogradWeightArgs& a) {
  parallel_for<T>(a.outputs, a.target.threads, [=](int64_t o) WF_BODY {
    for (int64_t begin = 0; begin < a.channels; begin += kChannels) {
      const int64_t m = a.channels - begin < kChannels ? a.channels - begin : kChannels;
      const int64_t at = o * a.channels + begin;
      const float* __restrict g = a.weight + 3 * at;
      float u[4][kChannels];
      for (int64_t j = 0; j < m; ++j) {
        const float outer = g[3 * j] + g[3 * j + 2], inner = g[3 * j + 1];
        u[0][j] = g[3 * j];
        u[1][j] = 0.5f * (outer + inner);
        u[2][j] = 0.5f * (outer - inner);
        u[3][j] = g[3 * j + 2];
      }
      for (int q = 0; q < 4; ++q) {
        T* __restrict out = static_cast<T*>(a.out[q]) + at;
        for (int64_t j = 0; j < m; ++j) out[j] = store<T>(u[q][j]);
      }
    }
  });
}

template <class T>
static void input(const WinogradInputArgs& a) {
  using A = compute_t<T>;
  const int64_t pairs = (a.tokens + 1) / 2, per_item = (pairs + kPairs - 1) / kPairs;
  const int64_t plane = a.batch * pairs * a.channels;
  parallel_for<T>(a.batch * per_item, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_item, first = i % per_item * kPairs;
    const int64_t last = first + kPairs < pairs ? first + kPairs : pairs;
    const T* x = static_cast<const T*>(a.x) + b * a.tokens * a.channels;
    for (int64_t t = first; t < last; ++t) {
      const int64_t n = 2 * t;
      const bool before = n > 0, next = n + 1 < a.tokens, after = n + 2 < a.tokens;
      const T* __restrict d1 = x + n * a.channels;
      const T* __restrict d0 = before ? d1 - a.channels : d1;
      const T* __restrict d2 = next ? d1 + a.channels : d1;
      const T* __restrict d3 = after ? d1 + 2 * a.channels : d1;
      T* __restrict out = static_cast<T*>(a.out) + (b * pairs + t) * a.channels;
      for (int64_t begin = 0; begin < a.channels; begin += kChannels) {
        const int64_t m = a.channels - begin < kChannels ? a.channels - begin : kChannels;
        A d[4][kChannels];
        auto token = [=](const T* __restrict from, bool exists, A* __restrict to) WF_BODY {
          for (int64_t j = 0; j < m; ++j) to[j] = exists ? load(from[begin + j]) : A(0);
        };
        token(d0, before, d[0]);
        token(d1, true, d[1]);
        token(d2, next, d[2]);
        token(d3, after, d[3]);
        for (int64_t j = 0; j < m; ++j) {
          const A sum = d[1][j] + d[2][j], difference = d[2][j] - d[1][j];
          d[0][j] -= d[2][j];
          d[3][j] = d[1][j] - d[3][j];
          d[1][j] = sum;
          d[2][j] = difference;
        }
        for (int q = 0; q < 4; ++q)
          for (int64_t j = 0; j < m; ++j) out[q * plane + begin + j] = store<T>(d[q][j]);
      }
    }
  });
}

template <class T>
static void output(const WinogradOutputArgs& a) {
  using A = compute_t<T>;
  const int64_t pairs = (a.tokens + 1) / 2, per_item = (pairs + kPairs - 1) / kPairs;
  const int64_t width = a.gated ? a.channels / 2 : a.channels;
  parallel_for<T>(a.batch * per_item, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_item, first = i % per_item * kPairs;
    const int64_t last = first + kPairs < pairs ? first + kPairs : pairs;
    for (int64_t t = first; t < last; ++t) {
      const int64_t at = (b * pairs + t) * a.channels;
      const T* __restrict m0 = static_cast<const T*>(a.product[0]) + at;
      const T* __restrict m1 = static_cast<const T*>(a.product[1]) + at;
      const T* __restrict m2 = static_cast<const T*>(a.product[2]) + at;
      const T* __restrict m3 = static_cast<const T*>(a.product[3]) + at;
      const T* __restrict bias = static_cast<const T*>(a.bias);
      T* __restrict even = static_cast<T*>(a.out) + (b * a.tokens + 2 * t) * width;
      T* __restrict odd = even + width;
      const bool whole = 2 * t + 1 < a.tokens;  // the last pair of an odd sequence is not
      for (int64_t begin = 0; begin < width; begin += kChannels) {
        const int64_t m = width - begin < kChannels ? width - begin : kChannels;
        A y[2][kChannels], g[2][kChannels];
        auto pair = [=](int64_t at, A* __restrict first, A* __restrict second) WF_BODY {
          for (int64_t j = 0; j < m; ++j) {
            first[j] = load(m0[at + j]) + load(m1[at + j]);
            second[j] = load(m1[at + j]) - load(m2[at + j]);
          }
          for (int64_t j = 0; j < m; ++j) {
            first[j] += load(m2[at + j]);
            second[j] -= load(m3[at + j]);
          }
          for (int64_t j = 0; bias && j < m; ++j) {
            const A c = load(bias[at + j]);
            first[j] += c;
            second[j] += c;
          }
        };
        // One copy of the code for both halves: it takes long to compile.
        for (int half = 0; half <= int(a.gated); ++half)
          pair(half * width + begin, half ? g[0] : y[0], half ? g[1] : y[1]);
        for (int q = 0; a.gated && q < 2; ++q)
          for (int64_t j = 0; j < m; ++j) y[q][j] = swiglu(y[q][j], g[q][j]);
        for (int64_t j = 0; j < m; ++j) even[begin + j] = store<T>(y[0][j]);
        for (int64_t j = 0; whole && j < m; ++j) odd[begin + j] = store<T>(y[1][j]);
      }
    }
  });
}

void winograd_weight_cpu(const WinogradWeightArgs& a) {
  dispatch("prepared_conv", a.dtype, [&](auto type) { weight<typename decltype(type)::type>(a); });
}

void winograd_input_cpu(const WinogradInputArgs& a) {
  dispatch("prepared_conv", a.dtype, [&](auto type) { input<typename decltype(type)::type>(a); });
}

void winograd_output_cpu(const WinogradOutputArgs& a) {
  dispatch("prepared_conv", a.dtype, [&](auto type) { output<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("winograd_weight", [](Target target, int dtype, uintptr_t weight,
                              std::array<uintptr_t, 4> out, int64_t outputs, int64_t channels) {
    winograd_weight_cpu({target, DType(dtype), pointer<float>(weight),
                         {pointer<void>(out[0]), pointer<void>(out[1]), pointer<void>(out[2]),
                          pointer<void>(out[3])},
                         outputs, channels});
  });
  m.def("winograd_input", [](Target target, int dtype, uintptr_t x, uintptr_t out, int64_t batch,
                             int64_t tokens, int64_t channels) {
    winograd_input_cpu({target, DType(dtype), pointer<void>(x), pointer<void>(out), batch,
                        tokens, channels});
  });
  m.def("winograd_output", [](Target target, int dtype, std::array<uintptr_t, 4> p, uintptr_t bias,
                              uintptr_t out, bool gated, int64_t batch, int64_t tokens,
                              int64_t channels) {
    winograd_output_cpu({target, DType(dtype),
                         {pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
                          pointer<void>(p[3])},
                         pointer<void>(bias), pointer<void>(out), gated, batch, tokens,
                         channels});
  });
}

}  // namespace wavflow
