#include "../flow_mix.h"

#include "../bind.h"
#include "parallel.h"

namespace wavflow {

constexpr int64_t kQuads = 64;  // normals are drawn 4 x 64 at a time, one loop the compiler vectorises

template <class T>
static void run(const FlowMixArgs& a) {
  using A = compute_t<T>;
  const int64_t per_row = blocks(a.count);
  parallel_for<T>(a.batch * per_row, a.target.threads, [=](int64_t i) WF_BODY {
    const int64_t b = i / per_row, begin = i % per_row * kBlock;
    const int64_t end = begin + kBlock < a.count ? begin + kBlock : a.count;
    const T* __restrict x_1 = static_cast<const T*>(a.x_1) + b * a.count;
    T* __restrict x_t = static_cast<T*>(a.x_t) + b * a.count;
    const A t = static_cast<const A*>(a.t)[b], sigma_min = A(a.sigma_min);
    if (a.noise != nullptr) {
      const A* __restrict x_0 = static_cast<const A*>(a.noise) + b * a.count;
      for (int64_t j = begin; j < end; ++j)
        x_t[j] = store<T>(flow_mix_value(x_0[j], load(x_1[j]), t, sigma_min));
      return;
    }
    A* __restrict x_0 = static_cast<A*>(a.x_0) + b * a.count;
    const uint64_t seed = uint64_t(a.seeds[b]);
    const A noise_scale = A(a.noise_scale);
    float z[4][kQuads];
    for (int64_t j = begin; j < end; j += 4 * kQuads) {
      for (int64_t l = 0; l < kQuads; ++l) {
        float four[4];
        normal4(seed, uint64_t((a.offset + j) / 4 + l), four);
        for (int k = 0; k < 4; ++k) z[k][l] = four[k];
      }
      const int64_t n = end - j < 4 * kQuads ? end - j : 4 * kQuads;
      for (int64_t k = 0; k < n; ++k) x_0[j + k] = A(z[k % 4][k / 4]) * noise_scale;
      for (int64_t k = 0; k < n; ++k)
        x_t[j + k] = store<T>(flow_mix_value(x_0[j + k], load(x_1[j + k]), t, sigma_min));
    }
  });
}

void flow_mix_cpu(const FlowMixArgs& a) {
  dispatch("flow_mix", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a); });
}

WAVFLOW_BIND(m) {
  m.def("flow_mix", [](Target target, int dtype, uintptr_t x_1, uintptr_t t, uintptr_t noise,
                       uintptr_t seeds, uintptr_t x_t, uintptr_t x_0, int64_t batch, int64_t count,
                       int64_t offset, double sigma_min, double noise_scale) {
    FlowMixArgs args{target, DType(dtype), pointer<void>(x_1), pointer<void>(t),
                     pointer<void>(noise), pointer<int64_t>(seeds), pointer<void>(x_t),
                     pointer<void>(x_0), batch, count, offset, sigma_min, noise_scale};
#ifdef WAVFLOW_CUDA
    if (target.device >= 0) return flow_mix_cuda(args);
#endif
    flow_mix_cpu(args);
  });
}

}  // namespace wavflow
