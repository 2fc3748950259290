// Launching on a given CUDA device and stream, with the device restored and errors raised by name.
#pragma once

#include <cstdint>
#include <string>

#include "../args.h"

namespace wavflow {
std::string cuda_probe();  // "" where a driver and a device answer, else why not
}

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace wavflow {

inline void cuda_check(cudaError_t status, const char* op) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(status) + ": " +
                             cudaGetErrorString(status));
}

// Makes `target`'s device current for a scope.
class DeviceScope {
 public:
  DeviceScope(const Target& target, const char* op) : op_(op) {
    cuda_check(cudaGetDevice(&previous_), op);
    if (previous_ != target.device) cuda_check(cudaSetDevice(target.device), op);
    changed_ = previous_ != target.device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  void check_launch() const { cuda_check(cudaGetLastError(), op_); }

 private:
  const char* op_;
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t stream_of(const Target& target) {
  return reinterpret_cast<cudaStream_t>(target.stream);
}

constexpr int kThreads = 256;

// Blocks for a grid-stride loop over `items`; enough to fill any present GPU several times.
inline int grid_for(int64_t items) {
  int64_t blocks = (items + kThreads - 1) / kThreads;
  return int(blocks < 1 ? 1 : blocks > 132 * 32 ? 132 * 32 : blocks);
}

#define WF_GRID_STRIDE(i, count)                                             \
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x,           \
               i##_step = int64_t(gridDim.x) * blockDim.x;                   \
       i < (count); i += i##_step)

// V elements moved as one 16-byte (or smaller) access.
template <class T, int V> struct alignas(sizeof(T) * V) Vec { T at[V]; };
template <class T> constexpr int vec_width() { return sizeof(T) >= 4 ? 16 / int(sizeof(T)) : 8; }
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Sum over the block's threads; valid in thread 0. `shared` holds kThreads / 32 values.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < kThreads / 32 ? shared[threadIdx.x] : A(0);
  if (threadIdx.x < 32)
    for (int offset = kThreads / 64; offset > 0; offset /= 2)
      value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace wavflow
#endif
