#include "../prepared_conv.h"

#include <array>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

constexpr int64_t kPairs = 8;  // of tokens, a block

template <class T>
static void input(const WinogradInputArgs& a) {
  using A = compute_t<T>;
  const int64_t pairs = (a.tokens + 1) / 2, per_item = (pairs + kPairs - 1) / kPairs;
  const int64_t plane = a.batch * pairs * a.channels;
  parallel_for(a.batch * per_item, a.target.threads, [=](int64_t i) WF_BODY {
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
      for (int64_t j = 0; j < a.channels; ++j) {
        A u[4];
        winograd_input<A>(before ? load(d0[j]) : A(0), load(d1[j]), next ? load(d2[j]) : A(0),
                          after ? load(d3[j]) : A(0), u);
        for (int q = 0; q < 4; ++q) out[q * plane + j] = store<T>(u[q]);
      }
    }
  });
}

template <class T, bool gated, bool biased>
static void output(const WinogradOutputArgs& a) {
  using A = compute_t<T>;
  const int64_t pairs = (a.tokens + 1) / 2, per_item = (pairs + kPairs - 1) / kPairs;
  const int64_t width = gated ? a.channels / 2 : a.channels;
  parallel_for(a.batch * per_item, a.target.threads, [=](int64_t i) WF_BODY {
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
      auto pair = [=](int64_t j, A y[2]) WF_BODY {
        winograd_output<A>(load(m0[j]), load(m1[j]), load(m2[j]), load(m3[j]),
                           biased ? A(load(bias[j])) : A(0), y);
      };
      for (int64_t j = 0; j < width; ++j) {
        A y[2];
        pair(j, y);
        if (gated) {
          A g[2];
          pair(width + j, g);
          y[0] = swiglu(y[0], g[0]);
          y[1] = swiglu(y[1], g[1]);
        }
        even[j] = store<T>(y[0]);
        if (whole) odd[j] = store<T>(y[1]);
      }
    }
  });
}

void winograd_input_cpu(const WinogradInputArgs& a) {
  dispatch("prepared_conv", a.dtype, [&](auto type) { input<typename decltype(type)::type>(a); });
}

void winograd_output_cpu(const WinogradOutputArgs& a) {
  dispatch("prepared_conv", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.gated) return a.bias ? output<T, true, true>(a) : output<T, true, false>(a);
    return a.bias ? output<T, false, true>(a) : output<T, false, false>(a);
  });
}

WAVFLOW_BIND(m) {
  m.def(
      "winograd_input",
      [](Target target, int dtype, uintptr_t x, uintptr_t out, int64_t batch, int64_t tokens,
         int64_t channels) {
        winograd_input_cpu({target, DType(dtype), pointer<void>(x), pointer<void>(out), batch,
                            tokens, channels});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def(
      "winograd_output",
      [](Target target, int dtype, std::array<uintptr_t, 4> p, uintptr_t bias, uintptr_t out,
         bool gated, int64_t batch, int64_t tokens, int64_t channels) {
        winograd_output_cpu({target, DType(dtype),
                             {pointer<void>(p[0]), pointer<void>(p[1]), pointer<void>(p[2]),
                              pointer<void>(p[3])},
                             pointer<void>(bias), pointer<void>(out), gated, batch, tokens,
                             channels});
      },
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace wavflow
