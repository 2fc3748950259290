#include "../swiglu.h"

#include <array>

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class T>
static void run(const SwigluArgs& a) {
  using A = compute_t<T>;
  // A block is so many rows, or a part of one.
  const int64_t channels = a.channels, rows = a.batch * a.tokens;
  const int64_t together = channels < kBlock ? kBlock / channels : 1, parts = blocks(channels);
  auto row = [=](const void* from, const int64_t* stride, int64_t r) WF_BODY {
    return static_cast<const T*>(from) + r / a.tokens * stride[0] + r % a.tokens * stride[1];
  };
  const int64_t count = parts > 1 ? rows * parts : (rows + together - 1) / together;
  parallel_for<T, true>(count, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t first = parts > 1 ? i / parts : i * together;
    const int64_t last = first + together < rows ? first + together : rows;
    const int64_t begin = parts > 1 ? i % parts * kBlock : 0;
    const int64_t n = channels - begin < kBlock ? channels - begin : kBlock;
    for (int64_t r = first; r < last; ++r) {
      const T* __restrict x = row(a.a, a.stride_a, r) + begin;
      const T* __restrict y = row(a.b, a.stride_b, r) + begin;
      T* __restrict out = static_cast<T*>(a.out) + r * channels + begin;
      if (!a.grad) {
        for (int64_t j = 0; j < n; ++j) out[j] = store<T>(swiglu<A>(load(x[j]), load(y[j])));
        continue;
      }
      const T* __restrict grad = row(a.grad, a.stride_grad, r) + begin;
      T* __restrict out_b = static_cast<T*>(a.out_b) + r * channels + begin;
      for (int64_t j = 0; j < n; ++j) {
        A d_a, d_b;
        swiglu_backward<A>(load(grad[j]), load(x[j]), load(y[j]), &d_a, &d_b);
        out[j] = store<T>(d_a);
        out_b[j] = store<T>(d_b);
      }
    }
  });
}

void swiglu_cpu(const SwigluArgs& a) {
  dispatch("swiglu", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("swiglu", [](Target target, int dtype, uintptr_t grad, uintptr_t a, uintptr_t b,
                     uintptr_t out, uintptr_t out_b, int64_t batch, int64_t tokens,
                     int64_t channels, std::array<int64_t, 6> s) {
    swiglu_cpu({target, DType(dtype), pointer<void>(grad), pointer<void>(a), pointer<void>(b),
                pointer<void>(out), pointer<void>(out_b), batch, tokens, channels,
                {s[0], s[1]}, {s[2], s[3]}, {s[4], s[5]}});
  });
}

}  // namespace wavflow
