// Vectors of one instruction set, and the few operations on them that C++ has no words for.
//
// Everything is GCC's vector extension, so it is plain C++ on any processor; multiply-add and bfloat16
// products are single instructions where the instruction set has them, as inline assembly: intrinsics
// cannot be inlined into code that is compiled for several instruction sets.
#pragma once

#include <cstring>
#include <type_traits>

#include "parallel.h"

namespace wavflow {

template <class A, int bytes> struct Vector {
  typedef A type __attribute__((vector_size(bytes)));
};

// exp2: bits of the mantissa, bias of the exponent, what rounds a number added to it to an integer and
// leaves that plus the bias in its low bits, and p with 2^f = 1 + f p(f) on [-1/2, 1/2] (interpolated
// at Chebyshev nodes; relative error 5e-9 and 8e-18).
template <class A> struct Exp2Table;
template <> struct Exp2Table<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23;
  static constexpr float smallest = -126, magic = 0x1.8p23f + 127, one = 1;
  static constexpr float p[] = {0.693147188f,   0.240226508f,   0.0555035711f,
                                0.00961808256f, 0.00133908634f, 0.000154531629f};
};
template <> struct Exp2Table<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52;
  static constexpr double smallest = -1022, magic = 0x1.8p52 + 1023, one = 1;
  static constexpr double p[] = {0.69314718055994530942,     0.2402265069591009822,
                                 0.055504108664821594339,    0.0096181291076068885273,
                                 0.001333355814641693531,    0.00015403530441736050155,
                                 1.5252733829836118394e-05,  1.3215442587921689653e-06,
                                 1.0178062445845773521e-07,  7.0725859492692236999e-09,
                                 4.4549605981865183938e-10};
};

// A matrix product of factors F (float, double, or pairs of BFloat16 in 32 bits) in instruction set I.
template <class I, class F> struct Simd {
  using A = compute_t<F>;  // sums
  using U = std::conditional_t<std::is_same_v<F, BFloat16>, uint32_t, F>;  // what a lane multiplies
  static constexpr int lanes = I::bytes / sizeof(A), pair = sizeof(U) / sizeof(F);
  static_assert(pair == 1 || I::bf16, "pairs need the instructions of AVX-512-bf16");
  using V = typename Vector<A, I::bytes>::type;
  using UV = typename Vector<U, I::bytes>::type;

  template <class X> static WF_HD X load(const void* from) {
    X x;
    __builtin_memcpy(&x, from, sizeof(x));
    return x;
  }
  template <class X> static WF_HD void store(void* to, X x) { __builtin_memcpy(to, &x, sizeof(x)); }
  // x in every lane. (GCC would fill it lane by lane where the instruction set is not the file's own.)
  template <class X> static WF_HD auto spread(const X& x) {
    using XV = typename Vector<X, I::bytes>::type;
#if WF_X86
    if constexpr (I::bytes > 16) {
      XV v;
      if constexpr (sizeof(X) == 4) asm("vbroadcastss %1, %0" : "=v"(v) : "m"(x));
      else asm("vbroadcastsd %1, %0" : "=v"(v) : "m"(x));
      return v;
    }
#endif
    return x - XV{};
  }

  // a b + c, in one rounding where the instruction set can.
  static WF_HD V fma(V a, V b, V c) {
#if WF_X86
    if constexpr (I::fma) {
      if constexpr (sizeof(A) == 4)
        asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
      else
        asm("vfmadd231pd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
      return c;
    }
#endif
    return a * b + c;
  }

  // c + a b, for pairs c + a_0 b_0 + a_1 b_1.
  static WF_HD V multiply_add(UV a, UV b, V c) {
    if constexpr (pair == 1) return fma(a, b, c);
#if WF_X86
    if constexpr (pair == 2) asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#endif
    return c;
  }

  // The factors of one vector, rounded: 16 BFloat16 in half a vector, or x itself.
  static WF_HD auto factors(V x) {
    if constexpr (pair == 1) {
      return x;
    } else {
      typename Vector<uint16_t, I::bytes / 2>::type half{};
#if WF_X86
      asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(x));
#endif
      return half;
    }
  }

  // One vector of pairs (first, second) of two vectors of factors.
  template <class H> static WF_HD UV interleaved(H first, H second) {
    UV low{}, high{};
#if WF_X86
    asm("vpmovzxwd %1, %0" : "=v"(low) : "v"(first));
    asm("vpmovzxwd %1, %0" : "=v"(high) : "v"(second));
#endif
    return low | high << 16;
  }

  // 2^(c x) for c x <= 0 to 2 ulp; 0 below the smallest normal number; NaN of NaN.
  class Exp2 {
   public:
    WF_HD explicit Exp2(const A& c)
        : c_(spread(c)), magic_(spread(E::magic)), smallest_(spread(E::smallest)),
          one_(spread(E::one)) {
#pragma GCC unroll 16
      for (int i = 0; i < degree; ++i) p_[i] = spread(E::p[i]);
    }
    WF_HD V operator()(V x) const {
      const V shifted = fma(x, c_, magic_), whole = shifted - magic_, f = fma(x, c_, -whole);
      V p = p_[degree - 1];
#pragma GCC unroll 16
      for (int i = degree - 2; i >= 0; --i) p = fma(p, f, p_[i]);
      p = fma(p, f, one_);
      const V power = bit_cast<V>(bit_cast<Bits>(shifted) << E::mantissa);
      return whole < smallest_ ? V{} : p * power;
    }

   private:
    using E = Exp2Table<A>;
    using Bits = typename Vector<typename E::Bits, I::bytes>::type;
    static constexpr int degree = sizeof(E::p) / sizeof(A);
    V c_, magic_, smallest_, one_, p_[degree];
  };

  // The larger one; y where x is NaN.
  static WF_HD V larger(V x, V y) { return x > y ? x : y; }

  static WF_HD A largest(V x) { return folded(x, [](auto a, auto b) WF_BODY { return a > b ? a : b; }); }
  static WF_HD A sum(V x) { return folded(x, [](auto a, auto b) WF_BODY { return a + b; }); }

 private:
  // All lanes joined by f, half with half.
  template <class X, class Join> static WF_HD A folded(X x, const Join& join) {
    if constexpr (sizeof(X) == 2 * sizeof(A)) {
      return join(x[0], x[1]);
    } else {
      using Half = typename Vector<A, sizeof(X) / 2>::type;
      Half half[2];
      __builtin_memcpy(half, &x, sizeof(x));
      return folded(join(half[0], half[1]), join);
    }
  }

 public:
  // acc (R, C vectors) += a (R, depth) b (depth, C vectors). a's units lie `row` apart from row to
  // row and `step` apart along the depth.
  template <int R, int C>
  static WF_HD void multiply(V (&acc)[R][C], const U* a, int64_t row, int64_t step, const U* b,
                             int64_t b_step, int64_t depth) {
    V c[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) c[r][j] = acc[r][j];
    for (int64_t p = 0; p < depth; ++p) {
      UV right[C];
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) right[j] = load<UV>(b + p * b_step + j * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const UV left = spread(a[r * row + p * step]);
#pragma GCC unroll 16
        for (int j = 0; j < C; ++j) c[r][j] = multiply_add(left, right[j], c[r][j]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) acc[r][j] = c[r][j];
  }
};

}  // namespace wavflow
