// Random numbers by counter and key: Philox integers, and the normals that Box and Muller make of them.
//
// The logarithm, sine and cosine are built from IEEE operations alone, as numeric.h explains: every
// processor draws the same bits. wavflow_kernels/_philox.py is the same in torch.
#pragma once

#include "numeric.h"

namespace wavflow {

// Natural logarithm of a normal float in (0, 1]: x = m 2^e with m in [sqrt(1/2), sqrt(2)),
// log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172, by five terms of the series.
WF_HD float log_unit(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  int32_t exponent = int32_t(bits >> 23) - 127;
  float m = bit_cast<float>((bits & 0x007fffffu) | 0x3f800000u);
  bool large = m > 1.41421356f;
  m = large ? m * 0.5f : m;
  float e = float(large ? exponent + 1 : exponent);
  float f = m - 1.0f;
  float s = f / (f + 2.0f);
  float z = s * s;
  float series = z * (0.333333333f + z * (0.2f + z * (0.142857143f + z * 0.111111111f)));
  // ln 2 in two parts; the first has 9 trailing zero bits, so its product with e is exact.
  return e * 0.693145752f + (s * 2.0f + (s * 2.0f * series + e * 1.42860677e-6f));
}

// Cosine and sine of 2 pi x / 2^32 by Taylor series on [-pi/4, pi/4] after exact integer reduction.
WF_HD void cos_sin_turn(uint32_t x, float* cosine, float* sine) {
  uint32_t quadrant = (x + 0x20000000u) >> 30;
  float a = float(int32_t(x - (quadrant << 30))) * 1.46291808e-9f;  // 2 pi / 2^32
  float z = a * a;
  float s = a + a * (z * (-1.66666667e-1f + z * (8.33333333e-3f + z * (-1.98412698e-4f + z * 2.75573192e-6f))));
  float c = 1.0f + z * (-0.5f + z * (4.16666667e-2f + z * (-1.38888889e-3f + z * (2.48015873e-5f + z * -2.75573192e-7f))));
  bool swap = (quadrant & 1u) != 0;
  float c0 = swap ? s : c, s0 = swap ? c : s;
  *cosine = (quadrant == 1u || quadrant == 2u) ? -c0 : c0;
  *sine = (quadrant & 2u) != 0 ? -s0 : s0;
}

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
WF_HD void philox(uint64_t counter, uint64_t key, uint32_t out[4]) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// Two standard normals from two 32-bit integers (Box and Muller 1958). u in [2^-32, 1].
WF_HD void normal_pair(uint32_t a, uint32_t b, float* z0, float* z1) {
  float u = float(int32_t(a >> 1)) * 4.65661287e-10f + 2.32830644e-10f;  // 2^-31, 2^-32
  float radius = square_root(-2.0f * log_unit(u));
  float c, s;
  cos_sin_turn(b, &c, &s);
  *z0 = radius * c;
  *z1 = radius * s;
}

// Standard normals number 4 block .. 4 block + 3 of the stream `seed`.
WF_HD void normal4(uint64_t seed, uint64_t block, float out[4]) {
  uint32_t x[4];
  philox(block, seed, x);
  normal_pair(x[0], x[1], out + 0, out + 1);
  normal_pair(x[2], x[3], out + 2, out + 3);
}

}  // namespace wavflow
