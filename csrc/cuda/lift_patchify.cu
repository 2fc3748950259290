// Two kernels: per-block sums and peaks, if no levels are given; then every block combines its item's
// partials and writes.
#include "../lift_patchify.h"

#include "launch.h"

namespace wavflow {

constexpr int64_t kChunk = 16384;  // samples a block reduces; ops/lift_patchify.py sizes partials by it

template <class A>
__device__ __forceinline__ A block_max(A value, A* shared) {
  for (int offset = 16; offset > 0; offset /= 2)
    value = maximum(value, __shfl_down_sync(0xffffffffu, value, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < kThreads / 32 ? shared[threadIdx.x] : A(0);
  if (threadIdx.x < 32)
    for (int offset = kThreads / 64; offset > 0; offset /= 2)
      value = maximum(value, __shfl_down_sync(0xffffffffu, value, offset));
  return value;
}

template <class In, int V>
__global__ void __launch_bounds__(kThreads) reduce(LiftArgs a, unsigned per_row) {
  using A = compute_t<In>;
  __shared__ A sums[kThreads / 32], peaks[kThreads / 32];
  const int64_t b = blockIdx.x / per_row, begin = int64_t(blockIdx.x % per_row) * kChunk;
  const int64_t n = a.lengths ? a.lengths[b] : a.samples;
  const int64_t count = n - begin < kChunk ? n - begin : kChunk;
  const In* x = static_cast<const In*>(a.wave) + b * a.samples + begin;
  A sum = 0, peak = 0;
  int64_t done = count < 0 ? 0 : count / V * V;
  for (int64_t i = int64_t(threadIdx.x) * V; i < done; i += kThreads * V) {
    const Vec<In, V> v = *reinterpret_cast<const Vec<In, V>*>(x + i);
#pragma unroll
    for (int l = 0; l < V; ++l) {
      const A s = load(v.at[l]);
      sum += s * s;
      peak = maximum(absolute(s), peak);
    }
  }
  for (int64_t i = done + threadIdx.x; i < count; i += kThreads) {
    const A s = load(x[i]);
    sum += s * s;
    peak = maximum(absolute(s), peak);
  }
  sum = block_sum(sum, sums);
  peak = block_max(peak, peaks);
  if (threadIdx.x == 0) {
    A* partials = static_cast<A*>(a.partials);
    partials[2 * blockIdx.x] = sum;
    partials[2 * blockIdx.x + 1] = peak;
  }
}

template <class In, class Out, int V>
__global__ void __launch_bounds__(kThreads) write(LiftArgs a, unsigned per_row, unsigned per_out_row) {
  using A = compute_t<In>;
  __shared__ A sums[kThreads / 32], peaks[kThreads / 32];
  __shared__ Lift<A> lift_of_item;
  const int64_t b = blockIdx.x / per_out_row, begin = int64_t(blockIdx.x % per_out_row) * kChunk;
  const int64_t n = a.lengths ? a.lengths[b] : a.samples;
  if (a.levels) {
    const A* level = static_cast<const A*>(a.levels) + 2 * b;
    if (threadIdx.x == 0) lift_of_item = lift_of(level[0], level[1], A(a.target_rms));
  } else {
    const A* partials = static_cast<const A*>(a.partials) + 2 * b * int64_t(per_row);
    A sum = 0, peak = 0;
    for (unsigned i = threadIdx.x; i < per_row; i += kThreads) {
      sum += partials[2 * i];
      peak = maximum(partials[2 * i + 1], peak);
    }
    sum = block_sum(sum, sums);
    peak = block_max(peak, peaks);
    if (threadIdx.x == 0) lift_of_item = lift_of(sum / A(n), peak, A(a.target_rms));
  }
  __syncthreads();

  const Lift<A> lift = lift_of_item;
  const A scale = A(a.audio_scale);
  const In* x = static_cast<const In*>(a.wave) + b * a.samples;
  Out* y = static_cast<Out*>(a.tokens) + b * a.kept;
  const int64_t end = begin + kChunk < a.kept ? begin + kChunk : a.kept;
  for (int64_t i = begin + int64_t(threadIdx.x) * V; i < end; i += kThreads * V) {
    if (V > 1 && i + V <= end && i + V <= n) {
      const Vec<In, V> v = *reinterpret_cast<const Vec<In, V>*>(x + i);
      Vec<Out, V> w;
#pragma unroll
      for (int l = 0; l < V; ++l) w.at[l] = store<Out>(lift_sample(load(v.at[l]), lift, scale));
      *reinterpret_cast<Vec<Out, V>*>(y + i) = w;
    } else {
      for (int64_t j = i; j < i + V && j < end; ++j)
        y[j] = store<Out>(j < n ? lift_sample(load(x[j]), lift, scale) : A(0));
    }
  }
}

template <class In, class Out, int V>
static void launch(const LiftArgs& a) {
  const DeviceScope scope(a.target, "lift_patchify");
  const auto per_row = unsigned((a.samples + kChunk - 1) / kChunk);
  const auto per_out_row = unsigned((a.kept + kChunk - 1) / kChunk);
  const cudaStream_t stream = stream_of(a.target);
  if (!a.levels) {
    reduce<In, V><<<unsigned(a.batch * per_row), kThreads, 0, stream>>>(a, per_row);
    scope.check_launch();
  }
  write<In, Out, V><<<unsigned(a.batch * per_out_row), kThreads, 0, stream>>>(a, per_row, per_out_row);
  scope.check_launch();
}

void lift_patchify_cuda(const LiftArgs& a) {
  dispatch_lift(a, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    constexpr int V = vec_width<In>();
    // Rows must start on 16 bytes for whole-vector access.
    const bool aligned = aligned16(a.wave) && aligned16(a.tokens) && a.samples % V == 0 && a.kept % V == 0;
    if (aligned) launch<In, Out, V>(a);
    else launch<In, Out, 1>(a);
  });
}

}  // namespace wavflow
