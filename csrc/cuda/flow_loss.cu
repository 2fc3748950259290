// Forward: per-block sums, then one block an item adds its partials (no atomics: deterministic).
#include "../flow_loss.h"

#include "launch.h"

namespace wavflow {

constexpr int64_t kChunk = 8192;  // elements a block reduces; ops/flow_loss.py sizes partials by it

template <class T, int V, bool kBackward>
__global__ void __launch_bounds__(kThreads) elements(FlowLossArgs a, int64_t per_row) {
  using A = compute_t<T>;
  __shared__ A sums[kThreads / 32];
  const int64_t b = blockIdx.x / per_row, begin = blockIdx.x % per_row * kChunk, at = b * a.count + begin;
  const int64_t n = a.count - begin < kChunk ? a.count - begin : kChunk;
  const auto item = flow_loss_item(a.kind, static_cast<const A*>(a.t)[b], A(a.sigma_min));
  const T* pred = static_cast<const T*>(a.pred) + at;
  const A* x_1 = static_cast<const A*>(a.x_1) + at;
  const A* other = a.other ? static_cast<const A*>(a.other) + at : nullptr;
  const A slope = kBackward ? A(2) * static_cast<const A*>(a.grad)[b] / A(a.count) * item.w * item.w : A(0);
  A sum = 0;
  for (int64_t i = int64_t(threadIdx.x) * V; i < n; i += kThreads * V) {
    const Vec<T, V> p = *reinterpret_cast<const Vec<T, V>*>(pred + i);
    const Vec<A, V> x = *reinterpret_cast<const Vec<A, V>*>(x_1 + i);
    Vec<A, V> o = {};
    if (other != nullptr) o = *reinterpret_cast<const Vec<A, V>*>(other + i);
    Vec<T, V> d_pred;
    Vec<A, V> d_residual;
#pragma unroll
    for (int l = 0; l < V; ++l) {
      const A residual = flow_loss_residual(item, A(load(p.at[l])), x.at[l], o.at[l]);
      if (kBackward) {
        d_residual.at[l] = slope * residual;
        d_pred.at[l] = store<T>(item.a * d_residual.at[l]);
      } else {
        const A r = item.w * residual;
        sum += r * r;
      }
    }
    if (kBackward) {
      *reinterpret_cast<Vec<T, V>*>(static_cast<T*>(a.out) + at + i) = d_pred;
      if (a.out_residual != nullptr)
        *reinterpret_cast<Vec<A, V>*>(static_cast<A*>(a.out_residual) + at + i) = d_residual;
    }
  }
  if (!kBackward) {
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) static_cast<A*>(a.partials)[blockIdx.x] = sum;
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads) finish(FlowLossArgs a, int64_t per_row) {
  __shared__ A sums[kThreads / 32];
  const A* partials = static_cast<const A*>(a.partials) + blockIdx.x * per_row;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < per_row; i += kThreads) sum += partials[i];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) static_cast<A*>(a.out)[blockIdx.x] = sum / A(a.count);
}

template <class T, int V>
static void launch(const FlowLossArgs& a) {
  const DeviceScope scope(a.target, "flow_loss");
  const int64_t per_row = (a.count + kChunk - 1) / kChunk;
  const cudaStream_t stream = stream_of(a.target);
  const unsigned grid = unsigned(a.batch * per_row);
  if (a.backward) {
    elements<T, V, true><<<grid, kThreads, 0, stream>>>(a, per_row);
  } else {
    elements<T, V, false><<<grid, kThreads, 0, stream>>>(a, per_row);
    scope.check_launch();
    finish<compute_t<T>><<<unsigned(a.batch), kThreads, 0, stream>>>(a, per_row);
  }
  scope.check_launch();
}

void flow_loss_cuda(const FlowLossArgs& a) {
  dispatch("flow_loss", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = vec_width<T>();
    const uintptr_t unit = sizeof(compute_t<T>) * V;
    auto fits = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % unit == 0; };
    const bool aligned = a.count % V == 0 && fits(a.pred) && fits(a.x_1) && fits(a.other) &&
                         (!a.backward || (fits(a.out) && fits(a.out_residual)));
    if (aligned) launch<T, V>(a);
    else launch<T, 1>(a);
  });
}

}  // namespace wavflow
