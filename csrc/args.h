// Element types as they arrive from Python, dispatch on them, and the registration of an op's binding.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "numeric.h"

namespace wavflow {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Where a call runs: the CPU with a number of threads, or a CUDA device and one of its streams.
struct Target {
  int device;        // -1: the CPU
  int threads;       // CPU only
  uintptr_t stream;  // CUDA only
};

// A real number among the arguments, rounded on the host so that no float kernel converts a double.
struct Real {
  double wide;
  float narrow;
  Real(double x) : wide(x), narrow(float(x)) {}
  WF_HD explicit operator double() const { return wide; }
  WF_HD explicit operator float() const { return narrow; }
};

template <class T> struct Type { using type = T; };

// Calls f(Type<T>{}) for the element type.
template <class F>
void dispatch(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f64: return f(Type<double>{});
    case DType::bf16: return f(Type<BFloat16>{});
    case DType::f16: return f(Type<Half>{});
  }
  throw std::invalid_argument(std::string(op) + ": unknown dtype code " + std::to_string(int(dtype)));
}

}  // namespace wavflow
