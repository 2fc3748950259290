// One step of a general linear solver: new state = M [D, state], D the guided prediction.
#pragma once

#include "args.h"

namespace wavflow {

struct OdeStepArgs {
  Target target;
  DType state_dtype;     // float32 or float64
  DType pred_dtype;      // float32, bfloat16, float16; float64 with a float64 state
  const void* state;     // (slots, count): x and up to two slots of history
  void* out;             // (slots, count); may be `state`
  const void* pred;      // (count)
  const void* uncond;    // (count) or null
  const void* table;     // (steps, 2 + slots * (slots + 1)): t, w, M by rows
  int64_t* index;        // (1): the row; one is added to it when `advance`
  int64_t slots, count, steps;
  bool advance;
};

// out[i] = M[i][0] D + sum_j M[i][1 + j] state[j]; D = w pred + (1 - w) uncond, or pred where guided is false.
template <int K, class A>
WF_HD void ode_step_element(const A* row, bool guided, A pred, A uncond, const A* state, A* out) {
  const A d = guided ? row[1] * pred + (A(1) - row[1]) * uncond : pred;
  for (int i = 0; i < K; ++i) {
    A y = row[2 + i * (K + 1)] * d;
    for (int j = 0; j < K; ++j) y += row[3 + i * (K + 1) + j] * state[j];
    out[i] = y;
  }
}

void ode_step_cpu(const OdeStepArgs& args);
void ode_step_cuda(const OdeStepArgs& args);

template <class F>
void dispatch_ode_step(const OdeStepArgs& a, F&& f) {
  auto slots = [&](auto state, auto pred) {
    if (a.slots == 1) return f(state, pred, std::integral_constant<int, 1>{});
    if (a.slots == 2) return f(state, pred, std::integral_constant<int, 2>{});
    if (a.slots == 3) return f(state, pred, std::integral_constant<int, 3>{});
    throw std::invalid_argument("ode_step: between 1 and 3 slots of state are supported");
  };
  if (a.state_dtype == DType::f64 && a.pred_dtype == DType::f64) return slots(Type<double>{}, Type<double>{});
  if (a.state_dtype == DType::f32 && a.pred_dtype == DType::f32) return slots(Type<float>{}, Type<float>{});
  if (a.state_dtype == DType::f32 && a.pred_dtype == DType::bf16) return slots(Type<float>{}, Type<BFloat16>{});
  if (a.state_dtype == DType::f32 && a.pred_dtype == DType::f16) return slots(Type<float>{}, Type<Half>{});
  throw std::invalid_argument("ode_step: no kernel for this pair of dtypes");
}

}  // namespace wavflow
