#include "../flow_mix.h"

#include "launch.h"

namespace wavflow {

// Each thread owns four neighbouring elements: one Philox block.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) mix(FlowMixArgs a) {
  using A = compute_t<T>;
  const int64_t quads = (a.count + 3) / 4;
  const A sigma_min = A(a.sigma_min), noise_scale = A(a.noise_scale);
  WF_GRID_STRIDE(i, a.batch * quads) {
    const int64_t b = i / quads, quad = i % quads, at = b * a.count + quad * 4;
    const int n = kVector || a.count - quad * 4 >= 4 ? 4 : int(a.count - quad * 4);
    const A t = static_cast<const A*>(a.t)[b];
    Vec<A, 4> x_0;
    Vec<T, 4> x_1, x_t;
    if (kVector) {
      x_1 = *reinterpret_cast<const Vec<T, 4>*>(static_cast<const T*>(a.x_1) + at);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < n) x_1.at[k] = static_cast<const T*>(a.x_1)[at + k];
    }
    if (a.noise != nullptr) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (kVector || k < n) x_0.at[k] = static_cast<const A*>(a.noise)[at + k];
    } else {
      float z[4];
      normal4(uint64_t(a.seeds[b]), uint64_t(a.offset / 4 + quad), z);
#pragma unroll
      for (int k = 0; k < 4; ++k) x_0.at[k] = A(z[k]) * noise_scale;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (kVector || k < n) x_t.at[k] = store<T>(flow_mix_value(x_0.at[k], load(x_1.at[k]), t, sigma_min));
    if (kVector) {
      *reinterpret_cast<Vec<T, 4>*>(static_cast<T*>(a.x_t) + at) = x_t;
      if (a.x_0 != nullptr) *reinterpret_cast<Vec<A, 4>*>(static_cast<A*>(a.x_0) + at) = x_0;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < n) static_cast<T*>(a.x_t)[at + k] = x_t.at[k];
        if (k < n && a.x_0 != nullptr) static_cast<A*>(a.x_0)[at + k] = x_0.at[k];
      }
    }
  }
}

void flow_mix_cuda(const FlowMixArgs& a) {
  dispatch("flow_mix", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const DeviceScope scope(a.target, "flow_mix");
    const int64_t quads = a.batch * ((a.count + 3) / 4);
    const uintptr_t unit = sizeof(compute_t<T>) * 4;
    const bool aligned = a.count % 4 == 0 && reinterpret_cast<uintptr_t>(a.x_1) % unit == 0 &&
                         reinterpret_cast<uintptr_t>(a.x_t) % unit == 0 &&
                         reinterpret_cast<uintptr_t>(a.x_0) % unit == 0;
    if (aligned) mix<T, true><<<grid_for(quads), kThreads, 0, stream_of(a.target)>>>(a);
    else mix<T, false><<<grid_for(quads), kThreads, 0, stream_of(a.target)>>>(a);
    scope.check_launch();
  });
}

}  // namespace wavflow
