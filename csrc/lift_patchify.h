// Amplitude lifting and waveform patchify: arithmetic of one item's gain and of one sample.
#pragma once

#include "args.h"

namespace wavflow {

struct LiftArgs {
  Target target;
  DType in, out;
  const void* wave;        // (batch, samples)
  const int64_t* lengths;  // (batch) or null: every row is whole
  const void* levels;      // (batch, 2) computed elements, mean square and peak, or null: the row's
  void* tokens;            // (batch, kept)
  void* partials;          // CUDA: batch * blocks * 2 computed elements
  int64_t batch, samples, kept;
  Real target_rms, audio_scale;
};

// y = clamp(x * gain / divisor, -1, 1) * scale
template <class A> struct Lift { A gain, divisor; };

template <class A>
WF_HD Lift<A> lift_of(A mean_square, A peak, A target_rms) {
  A rms = square_root(mean_square);
  bool audible = rms > A(1e-8);
  A gain = audible ? target_rms / rms : A(1);
  A lifted_peak = peak * gain;
  A lifted_rms = audible ? target_rms : rms;
  bool scale_to_fit = lifted_peak > A(1) && lifted_rms / lifted_peak > A(0.3);
  return Lift<A>{gain, scale_to_fit ? lifted_peak : A(1)};
}

template <class A>
WF_HD A lift_sample(A x, Lift<A> lift, A scale) {
  A y = x * lift.gain / lift.divisor;
  y = y > A(1) ? A(1) : y;
  y = y < A(-1) ? A(-1) : y;
  return y * scale;
}

void lift_patchify_cpu(const LiftArgs& args);
void lift_patchify_cuda(const LiftArgs& args);

// Calls f(Type<In>, Type<Out>) for the pairs of element types that exist: In to itself, float32 to any half.
template <class F>
void dispatch_lift(const LiftArgs& a, F&& f) {
  if (a.in == DType::f32 && a.out == DType::bf16) return f(Type<float>{}, Type<BFloat16>{});
  if (a.in == DType::f32 && a.out == DType::f16) return f(Type<float>{}, Type<Half>{});
  if (a.in != a.out) throw std::invalid_argument("lift_patchify: no kernel for this pair of dtypes");
  dispatch("lift_patchify", a.in, [&](auto type) { f(type, type); });
}

}  // namespace wavflow
