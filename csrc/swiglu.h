// silu(a) * b and its gradients: one element of each, and the exponential they need.
#pragma once

#include "args.h"

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

// e^x for x <= 0, 0 where it is not a normal number: 2^n e^r with n = round(x / ln 2) and
// |r| <= ln(2) / 2, e^r by its Taylor series. Adding 1.5 2^m leaves n in the low bits of the sum, from
// where it goes into the exponent. ln 2 is split in two parts, the first with trailing zero bits.
WF_HD float exp_negative(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r;
  const float scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  const float e = scale + scale * p;
  return x < -87.0f ? 0.0f : e;
}
WF_HD double exp_negative(double x) {
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
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
  const double scale = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023u) << 52);
  const double e = scale + scale * p;
  return x < -708.0 ? 0.0 : e;
}

// sigmoid(a) = (a < 0 ? e : 1) / (1 + e) with e = e^-|a|: nothing overflows.
template <class A> WF_HD A swiglu(A a, A b) {
  const A e = exp_negative(a < 0 ? a : -a);
  return a * (a < 0 ? e : A(1)) / (A(1) + e) * b;
}

template <class A> WF_HD void swiglu_backward(A grad, A a, A b, A* d_a, A* d_b) {
  const A e = exp_negative(a < 0 ? a : -a), part = A(1) / (A(1) + e);
  const A s = a < 0 ? e * part : part, rest = a < 0 ? part : e * part;  // sigmoid of a and -a
  *d_a = grad * b * (s * (A(1) + a * rest));
  *d_b = grad * (a * s);
}

void swiglu_cpu(const SwigluArgs& args);

}  // namespace wavflow
