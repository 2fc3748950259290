// silu(a) * b and its gradients: one element of each, and the exponential they need.
#pragma once

#include "check.h"

namespace wavflow {

struct SwigluArgs {
  Target target;
  DType dtype;
  const void* grad;  // (batch, tokens, channels), or null: forward
  const void* a;     // (batch, tokens, channels)
  const void* b;     // (batch, tokens, channels)
  void* out;         // contiguous; forward: the result, backward: the gradient of a
  void* out_b;       // contiguous; backward: the gradient of b
  int64_t batch, tokens, channels;
  int64_t stride_a[2], stride_b[2], stride_grad[2];  // of batch and token, in elements
};

// 1 / (1 + e^-x). e^t = 2^n e^r with n = round(t / ln 2) and |r| <= ln(2) / 2, e^r by its Taylor
// series. Adding 1.5 2^m leaves n in the low bits of the sum, from where it goes into the exponent.
WF_HD float sigmoid(float x) {
  float t = x > 87.0f ? -87.0f : -x;  // below, 1 + e^t rounds to 1; a NaN stays
  const float limited = t > 88.0f ? 88.0f : t;
  const float shifted = limited * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts; the first has 9 trailing zero bits, so its product with n is exact.
  const float r = (limited - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
  const float e = t > 88.0f ? bit_cast<float>(0x7f800000u) : scale + scale * p;
  return 1.0f / (1.0f + e);
}
WF_HD double sigmoid(double x) {
  double t = x > 700.0 ? -700.0 : -x;
  const double limited = t > 709.0 ? 709.0 : t;
  const double shifted = limited * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  // ln 2 in two parts; the first has 21 trailing zero bits.
  const double r = (limited - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
  double p = 1.6059043836821613e-10;
  p = p * r + 2.08767569878681e-9;
  p = p * r + 2.5052108385441720e-8;
  p = p * r + 2.7557319223985888e-7;
  p = p * r + 2.7557319223985893e-6;
  p = p * r + 2.4801587301587302e-5;
  p = p * r + 1.9841269841269841e-4;
  p = p * r + 1.3888888888888889e-3;
  p = p * r + 8.3333333333333332e-3;
  p = p * r + 4.1666666666666664e-2;
  p = p * r + 1.6666666666666666e-1;
  p = p * r + 5.0e-1;
  p = p * r * r + r;
  const double scale =
      bit_cast<double>((bit_cast<uint64_t>(shifted) - 0x4338000000000000u + 1023u) << 52);
  const double e = t > 709.0 ? bit_cast<double>(uint64_t(0x7ff0000000000000u)) : scale + scale * p;
  return 1.0 / (1.0 + e);
}

template <class A> WF_HD A swiglu(A a, A b) { return a * sigmoid(a) * b; }

template <class A> WF_HD void swiglu_backward(A grad, A a, A b, A* d_a, A* d_b) {
  const A s = sigmoid(a);
  *d_a = grad * b * (s * (A(1) + a * (A(1) - s)));
  *d_b = grad * (a * s);
}

void swiglu_cpu(const SwigluArgs& args);

}  // namespace wavflow
