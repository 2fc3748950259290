#include "../unpatchify.h"

#include "launch.h"

namespace wavflow {

template <class T, int V>
__global__ void __launch_bounds__(kThreads) flatten(UnpatchifyArgs a) {
  const int64_t per_row = a.samples / V;
  const auto scale = compute_t<T>(a.audio_scale);
  WF_GRID_STRIDE(i, a.batch * per_row) {
    const int64_t b = i / per_row, p = i % per_row * V;
    const T* from = static_cast<const T*>(a.tokens) + b * a.elements + p;
    const Vec<T, V> x = *reinterpret_cast<const Vec<T, V>*>(from);
    Vec<T, V> y;
#pragma unroll
    for (int l = 0; l < V; ++l) y.at[l] = unpatchify_sample(x.at[l], scale);
    *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(a.wave) + b * a.samples + p) = y;
  }
}

void unpatchify_cuda(const UnpatchifyArgs& a) {
  dispatch("unpatchify", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = vec_width<T>();
    const DeviceScope scope(a.target, "unpatchify");
    const cudaStream_t stream = stream_of(a.target);
    const bool aligned = aligned16(a.tokens) && aligned16(a.wave) && a.samples % V == 0 && a.elements % V == 0;
    if (aligned)
      flatten<T, V><<<grid_for(a.batch * a.samples / V), kThreads, 0, stream>>>(a);
    else
      flatten<T, 1><<<grid_for(a.batch * a.samples), kThreads, 0, stream>>>(a);
    scope.check_launch();
  });
}

}  // namespace wavflow
