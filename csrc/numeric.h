// Element types and elementary functions that the CPU and the CUDA build share.
//
// Everything here is built from IEEE +, -, *, / and sqrt and is compiled without contraction
// (-ffp-contract=off, --fmad=false), so a result is the same bit pattern on every instruction set and
// on the GPU; swiglu.cpp and prepared_conv.cpp alone are compiled with it. libm and CUDA's math
// functions differ in their last bits and are not used.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define WF_HD __host__ __device__ __forceinline__
#else
#define WF_HD __attribute__((always_inline)) inline
#endif

namespace wavflow {

template <class To, class From>
WF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
#ifdef __CUDA_ARCH__
  union { From f; To t; } u;
  u.f = from;
  return u.t;
#else
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
#endif
}

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// The type in which an element is computed: double for double, float for everything else.
template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class T> using compute_t = typename Compute<T>::type;

WF_HD double load(double x) { return x; }
WF_HD float load(float x) { return x; }
WF_HD float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
WF_HD float load(Half x) {
  // The half's exponent and mantissa, read as a float, are 2^112 too small; subnormals included.
  float magnitude = bit_cast<float>(uint32_t(x.bits & 0x7fffu) << 13) * bit_cast<float>(0x77800000u);
  uint32_t bits = bit_cast<uint32_t>(magnitude);
  bits = (x.bits & 0x7c00u) == 0x7c00u ? bits | 0x7f800000u : bits;
  return bit_cast<float>(bits | (uint32_t(x.bits & 0x8000u) << 16));
}

// store<T>: rounded once, to nearest even.
template <class T> struct Store;
template <> struct Store<double> { static WF_HD double from(double x) { return x; } };
template <> struct Store<float> { static WF_HD float from(float x) { return x; } };
template <> struct Store<BFloat16> {
  static WF_HD BFloat16 from(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{uint16_t(nan ? 0x7fc0u : rounded)};
  }
};
template <> struct Store<Half> {
  static WF_HD Half from(float x) {
    uint32_t bits = bit_cast<uint32_t>(x);
    uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Below 2^-14 adding 0.5 rounds at 2^-24, the spacing of subnormal halves.
    uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return Half{uint16_t(h | sign)};
  }
};
template <class T> WF_HD T store(compute_t<T> x) { return Store<T>::from(x); }

template <class A> WF_HD A absolute(A x) { return x < A(0) ? -x : x; }
// A NaN in either argument is returned.
template <class A> WF_HD A maximum(A a, A b) { return (a > b || a != a) ? a : b; }
WF_HD float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
WF_HD double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace wavflow
