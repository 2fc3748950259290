#include "../unpatchify.h"

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

template <class T>
static void run(const UnpatchifyArgs& a) {
  const int64_t per_row = blocks(a.samples);
  const T* tokens = static_cast<const T*>(a.tokens);
  T* wave = static_cast<T*>(a.wave);
  parallel_for<T>(a.batch * per_row, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_row, begin = i % per_row * kBlock;
    const int64_t end = begin + kBlock < a.samples ? begin + kBlock : a.samples;
    const T* __restrict x = tokens + b * a.elements;
    T* __restrict y = wave + b * a.samples;
    const auto scale = compute_t<T>(a.audio_scale);
    for (int64_t p = begin; p < end; ++p) y[p] = unpatchify_sample(x[p], scale);
  });
}

void unpatchify_cpu(const UnpatchifyArgs& a) {
  dispatch("unpatchify", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("unpatchify", [](Target target, int dtype, uintptr_t tokens, uintptr_t wave, int64_t batch,
                         int64_t elements, int64_t samples, double audio_scale) {
    UnpatchifyArgs args{target, DType(dtype), pointer<void>(tokens), pointer<void>(wave), batch,
                        elements, samples, audio_scale};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return unpatchify_cuda(args);
#endif
    unpatchify_cpu(args);
  });
}

}  // namespace wavflow
