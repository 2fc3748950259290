// The index lives on the device and is advanced by a second, one-thread kernel on the same stream,
// so a captured graph replays step after step. An index past the table writes NaN.
#include "../ode_step.h"

#include "launch.h"

namespace wavflow {

template <class A, class T, int K, int V>
__global__ void __launch_bounds__(kThreads) step(OdeStepArgs a) {
  constexpr int kRow = 2 + K * (K + 1);
  const int64_t at = *a.index;
  const bool inside = at >= 0 && at < a.steps;
  A row[kRow];
#pragma unroll
  for (int k = 0; k < kRow; ++k) row[k] = inside ? static_cast<const A*>(a.table)[at * kRow + k] : A(NAN);
  const T* pred = static_cast<const T*>(a.pred);
  const T* uncond = static_cast<const T*>(a.uncond);
  const A* state = static_cast<const A*>(a.state);
  A* out = static_cast<A*>(a.out);
  WF_GRID_STRIDE(i, a.count / V) {
    const int64_t p = i * V;
    const Vec<T, V> d = *reinterpret_cast<const Vec<T, V>*>(pred + p);
    Vec<T, V> u = d;
    if (uncond != nullptr) u = *reinterpret_cast<const Vec<T, V>*>(uncond + p);
    Vec<A, V> s[K], y[K];
#pragma unroll
    for (int j = 0; j < K; ++j) s[j] = *reinterpret_cast<const Vec<A, V>*>(state + j * a.count + p);
#pragma unroll
    for (int l = 0; l < V; ++l) {
      A from[K], to[K];
#pragma unroll
      for (int j = 0; j < K; ++j) from[j] = s[j].at[l];
      ode_step_element<K, A>(row, uncond != nullptr, A(load(d.at[l])), A(load(u.at[l])), from, to);
#pragma unroll
      for (int j = 0; j < K; ++j) y[j].at[l] = to[j];
    }
#pragma unroll
    for (int j = 0; j < K; ++j) *reinterpret_cast<Vec<A, V>*>(out + j * a.count + p) = y[j];
  }
}

__global__ void advance(int64_t* index) { *index += 1; }

void ode_step_cuda(const OdeStepArgs& a) {
  dispatch_ode_step(a, [&](auto state, auto pred, auto slots) {
    using A = typename decltype(state)::type;
    using T = typename decltype(pred)::type;
    constexpr int K = decltype(slots)::value, V = vec_width<A>();
    const DeviceScope scope(a.target, "ode_step");
    const cudaStream_t stream = stream_of(a.target);
    const bool aligned = a.count % V == 0 && aligned16(a.state) && aligned16(a.out) &&
                         aligned16(a.pred) && aligned16(a.uncond);
    if (aligned) step<A, T, K, V><<<grid_for(a.count / V), kThreads, 0, stream>>>(a);
    else step<A, T, K, 1><<<grid_for(a.count), kThreads, 0, stream>>>(a);
    scope.check_launch();
    if (a.advance) {
      advance<<<1, 1, 0, stream>>>(a.index);
      scope.check_launch();
    }
  });
}

}  // namespace wavflow
