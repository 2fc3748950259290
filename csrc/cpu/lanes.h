// Sixteen elements at a time, as vectors that every instruction set can hold in some of its registers.
//
// Loops over a row are written with these where the compiler does not keep the lanes of lane_sum in
// registers. Each lane does what load() and store() of numeric.h do, so the bits are the same.
#pragma once

#include "../numeric.h"

namespace wavflow {

constexpr int kLanes = 16;

template <class A> struct LanesOf { typedef A type __attribute__((vector_size(kLanes * sizeof(A)))); };
template <class A> using Lanes = typename LanesOf<A>::type;

template <class To, class From>
WF_HD Lanes<To> convert(From from) {
  return __builtin_convertvector(from, Lanes<To>);
}

template <class V, class T>
WF_HD V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

WF_HD Lanes<double> load_lanes(const double* p) { return read<Lanes<double>>(p); }
WF_HD Lanes<float> load_lanes(const float* p) { return read<Lanes<float>>(p); }
WF_HD Lanes<float> load_lanes(const BFloat16* p) {
  return bit_cast<Lanes<float>>(convert<uint32_t>(read<Lanes<uint16_t>>(p)) << 16);
}
WF_HD Lanes<float> load_lanes(const Half* p) {
  const Lanes<uint32_t> h = convert<uint32_t>(read<Lanes<uint16_t>>(p));
  const Lanes<float> magnitude =
      bit_cast<Lanes<float>>((h & 0x7fffu) << 13) * bit_cast<float>(0x77800000u);
  const Lanes<uint32_t> bits = bit_cast<Lanes<uint32_t>>(magnitude);
  const Lanes<uint32_t> special = bits | 0x7f800000u;
  return bit_cast<Lanes<float>>(((h & 0x7c00u) == 0x7c00u ? special : bits) | ((h & 0x8000u) << 16));
}

WF_HD void store_lanes(double* p, Lanes<double> x) { std::memcpy(p, &x, sizeof(x)); }
WF_HD void store_lanes(float* p, Lanes<float> x) { std::memcpy(p, &x, sizeof(x)); }
WF_HD void store_bits(void* p, Lanes<uint32_t> bits) {
  const Lanes<uint16_t> narrow = convert<uint16_t>(bits);
  std::memcpy(p, &narrow, sizeof(narrow));
}
WF_HD void store_lanes(BFloat16* p, Lanes<float> x) {
  const Lanes<uint32_t> bits = bit_cast<Lanes<uint32_t>>(x);
  const Lanes<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Lanes<uint32_t> nan = Lanes<uint32_t>{} + 0x7fc0u;
  store_bits(p, (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
WF_HD void store_lanes(Half* p, Lanes<float> x) {
  const Lanes<uint32_t> bits = bit_cast<Lanes<uint32_t>>(x), zero = {};
  const Lanes<uint32_t> sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Lanes<uint32_t> subnormal =
      bit_cast<Lanes<uint32_t>>(bit_cast<Lanes<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Lanes<uint32_t> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Lanes<uint32_t> h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? zero + 0x7c00u : h;
  h = magnitude > 0x7f800000u ? zero + 0x7e00u : h;
  store_bits(p, h | sign);
}

// How a loop body touches memory: all lanes, or the first `count` at the end of a row. Lanes beyond
// are read as zero.
struct AllLanes {
  template <class T> WF_HD auto load(const T* p) const { return load_lanes(p); }
  template <class T, class V> WF_HD void store(T* p, V x) const { store_lanes(p, x); }
  template <class V> WF_HD V keep(V x) const { return x; }
};
struct FirstLanes {
  int64_t count;
  template <class T> WF_HD auto load(const T* p) const {
    T row[kLanes] = {};
    std::memcpy(row, p, size_t(count) * sizeof(T));
    return load_lanes(row);
  }
  template <class T, class V> WF_HD void store(T* p, V x) const {
    T row[kLanes];
    store_lanes(row, x);
    std::memcpy(p, row, size_t(count) * sizeof(T));
  }
  // x in the lanes that exist, 0 in the others.
  template <class V> WF_HD V keep(V x) const {
    for (int64_t i = count; i < kLanes; ++i) x[i] = 0;
    return x;
  }
};

// body(j, lanes) for j = 0, 16, 32, ...
template <class Body>
WF_HD void for_lanes(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) body(j, AllLanes{});
  if (j < count) body(j, FirstLanes{count - j});
}

// The sum of a vector's lanes, as a fixed tree of halves.
template <class A>
WF_HD A total(Lanes<A> x) {
  typedef A Eight __attribute__((vector_size(8 * sizeof(A))));
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
  const char* lanes = reinterpret_cast<const char*>(&x);
  const Eight eight = read<Eight>(lanes) + read<Eight>(lanes + sizeof(Eight));
  lanes = reinterpret_cast<const char*>(&eight);
  const Four four = read<Four>(lanes) + read<Four>(lanes + sizeof(Four));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// Sum of all lanes of f(j, lanes), in four running vectors: one would wait for its own additions.
template <class A, class F>
WF_HD A sum_lanes(int64_t count, const F& f) {
  Lanes<A> a = {}, b = {}, c = {}, d = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes) {
    a += f(j, AllLanes{});
    b += f(j + kLanes, AllLanes{});
    c += f(j + 2 * kLanes, AllLanes{});
    d += f(j + 3 * kLanes, AllLanes{});
  }
  for (; j + kLanes <= count; j += kLanes) a += f(j, AllLanes{});
  if (j < count) b += f(j, FirstLanes{count - j});
  return total<A>((a + b) + (c + d));
}

}  // namespace wavflow
