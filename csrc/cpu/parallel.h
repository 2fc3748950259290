// Threads and instruction sets of the CPU kernels.
//
// One binary holds every kernel for three instruction sets and picks at run time; WAVFLOW_CPU_ISA
// (avx512_bf16, avx512, avx2 or default) overrides. Work is cut into blocks whose size never depends on the
// number of threads, so results do not either.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../numeric.h"

namespace wavflow {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };
Isa isa();               // the instruction set in use
bool in_forked_child();  // libgomp's thread pool does not survive fork()

bool has_avx512_bf16();  // with isa() == Isa::avx512: whether its bf16 is in use too

#if defined(__x86_64__) && defined(__GNUC__)
#define WF_X86 1
#define WF_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,lzcnt,movbe")))
#define WF_AVX512 __attribute__((target("avx2,fma,bmi,bmi2,lzcnt,movbe,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")))
#else
#define WF_X86 0
#define WF_AVX2
#define WF_AVX512
#endif

// The body of a loop must be an always-inline lambda (WF_BODY), so that it is compiled anew inside
// the run() of each instruction set; run() itself is one copy of that code (WF_APART).
#define WF_BODY __attribute__((always_inline))
#define WF_APART __attribute__((noinline))

// Instruction sets as types, for kernels that are written in vectors of their width (simd.h).
struct Baseline {
  static constexpr int bytes = 16;
  static constexpr bool fma = false, bf16 = false;
  template <class Body> WF_APART static void run(const Body& body, int64_t i) { body(i); }
};
struct Avx2 {
  static constexpr int bytes = 32;
  static constexpr bool fma = true, bf16 = false;
  template <class Body> WF_APART WF_AVX2 static void run(const Body& body, int64_t i) { body(i); }
};
struct Avx512 {
  static constexpr int bytes = 64;
  static constexpr bool fma = true, bf16 = false;
  template <class Body> WF_APART WF_AVX512 static void run(const Body& body, int64_t i) { body(i); }
};
// Instructions of AVX-512-bf16 are written in assembly, so the target need not name it.
struct Avx512Bf16 : Avx512 {
  static constexpr bool bf16 = true;
};

// Whether kernels of elements T are compiled for every instruction set. They take long to compile, and
// float64 and float16 serve checks: theirs are compiled once, for the baseline, which is at most 1.4
// times as slow in most ops. SwiGLU and attention ask for every set: they took 2.3 to 3.5 times.
template <class T>
constexpr bool in_every_isa = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

// Calls f(I{}) of the instruction set in use that elements T have.
template <class T, bool every = in_every_isa<T>, class F>
void dispatch_isa(F&& f) {
#if WF_X86
  if constexpr (every) {
    if (isa() == Isa::avx512) return f(Avx512{});
    if (isa() == Isa::avx2) return f(Avx2{});
  }
#endif
  f(Baseline{});
}

// Calls body(i) for i in [0, count) with code for one instruction set.
template <class I, class Body>
void parallel_for(I, int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1 && !in_forked_child()) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) I::run(body, i);
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) I::run(body, i);
}

// The same in the instruction set in use that elements T have.
template <class T, bool every = in_every_isa<T>, class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  dispatch_isa<T, every>([&](auto isa) { parallel_for(isa, count, threads, body); });
}

constexpr int64_t kBlock = 16384;  // elements a block; 64 KiB of float32

inline int64_t blocks(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

// Sum of f(0) .. f(count - 1) in 16 running lanes, added as a fixed tree: the same bits in every
// instruction set, and the compiler vectorises it without reassociating.
template <class A, class F>
WF_HD A lane_sum(int64_t count, const F& f) {
  constexpr int lanes = 16;
  A sum[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int l = 0; l < lanes; ++l) sum[l] += f(i + l);
  for (int l = 0; i < count; ++i, ++l) sum[l] += f(i);
  for (int width = lanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
  return sum[0];
}

template <class A> struct Magnitude;
template <> struct Magnitude<float> { using bits = uint32_t; static constexpr bits mask = 0x7fffffffu; };
template <> struct Magnitude<double> {
  using bits = uint64_t;
  static constexpr bits mask = 0x7fffffffffffffffu;
};

// The largest |f(i)|, 0 for none, NaN if there is one. Magnitudes are ordered like their bit patterns
// with NaN on top, and an integer maximum is vectorised where a float's is not.
template <class A, class F>
WF_HD A largest_magnitude(int64_t count, const F& f) {
  using Bits = typename Magnitude<A>::bits;
  Bits top = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits bits = bit_cast<Bits>(A(f(i))) & Magnitude<A>::mask;
    top = bits > top ? bits : top;
  }
  return bit_cast<A>(top);
}

}  // namespace wavflow
