#include "../unpatchify.h"

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class T>
static void run(const UnpatchifyArgs& a) {
  using A = compute_t<T>;
  const int64_t per_row = blocks(a.samples);
  const int64_t item = a.windows * a.window_tokens * a.token_size;
  const T* tokens = static_cast<const T*>(a.tokens);
  const A* window = static_cast<const A*>(a.window);
  T* wave = static_cast<T*>(a.wave);
  parallel_for<T>(a.batch * per_row, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_row, begin = i % per_row * kBlock;
    const int64_t end = begin + kBlock < a.samples ? begin + kBlock : a.samples;
    const T* __restrict x = tokens + b * item;
    T* __restrict y = wave + b * a.samples;
    if (a.windows == 1 && window == nullptr) {
      const A scale = A(a.audio_scale);
      for (int64_t p = begin; p < end; ++p) y[p] = store<T>(load(x[p]) / scale);
    } else {
      for (int64_t p = begin; p < end; ++p) y[p] = store<T>(unpatchify_sample<T, A>(x, window, p, a));
    }
  });
}

void unpatchify_cpu(const UnpatchifyArgs& a) {
  dispatch("unpatchify", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("unpatchify", [](Target target, int dtype, uintptr_t tokens, uintptr_t window,
                         uintptr_t wave, int64_t batch, int64_t windows, int64_t window_tokens,
                         int64_t token_size, int64_t hop, int64_t samples, double audio_scale) {
    UnpatchifyArgs args{target, DType(dtype), pointer<void>(tokens), pointer<void>(window),
                        pointer<void>(wave), batch, windows, window_tokens, token_size, hop,
                        samples, audio_scale};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return unpatchify_cuda(args);
#endif
    unpatchify_cpu(args);
  });
}

}  // namespace wavflow
