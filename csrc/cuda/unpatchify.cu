#include "../unpatchify.h"

#include "launch.h"

namespace wavflow {

template <class T, int V>
__global__ void __launch_bounds__(kThreads) flatten(UnpatchifyArgs a) {
  using A = compute_t<T>;
  const int64_t item = a.windows * a.window_tokens * a.token_size, per_row = a.samples / V;
  const A scale = A(a.audio_scale);
  WF_GRID_STRIDE(i, a.batch * per_row) {
    const int64_t b = i / per_row, p = i % per_row * V;
    const Vec<T, V> x = *reinterpret_cast<const Vec<T, V>*>(static_cast<const T*>(a.tokens) + b * item + p);
    Vec<T, V> y;
#pragma unroll
    for (int l = 0; l < V; ++l) y.at[l] = store<T>(load(x.at[l]) / scale);
    *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(a.wave) + b * a.samples + p) = y;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) overlap_add(UnpatchifyArgs a) {
  using A = compute_t<T>;
  const int64_t item = a.windows * a.window_tokens * a.token_size;
  WF_GRID_STRIDE(i, a.batch * a.samples) {
    const T* x = static_cast<const T*>(a.tokens) + i / a.samples * item;
    const A* window = static_cast<const A*>(a.window);
    static_cast<T*>(a.wave)[i] = store<T>(unpatchify_sample<T, A>(x, window, i % a.samples, a));
  }
}

void unpatchify_cuda(const UnpatchifyArgs& a) {
  dispatch("unpatchify", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = vec_width<T>();
    const DeviceScope scope(a.target, "unpatchify");
    const cudaStream_t stream = stream_of(a.target);
    const int64_t item = a.windows * a.window_tokens * a.token_size;
    const bool aligned = aligned16(a.tokens) && aligned16(a.wave) && a.samples % V == 0 && item % V == 0;
    if (a.windows > 1 || a.window != nullptr)
      overlap_add<T><<<grid_for(a.batch * a.samples), kThreads, 0, stream>>>(a);
    else if (aligned)
      flatten<T, V><<<grid_for(a.batch * a.samples / V), kThreads, 0, stream>>>(a);
    else
      flatten<T, 1><<<grid_for(a.batch * a.samples), kThreads, 0, stream>>>(a);
    scope.check_launch();
  });
}

}  // namespace wavflow
