// The four flow-matching losses: residual of one element, its weight, and the gradient.
#pragma once

#include "args.h"

namespace wavflow {

enum class FlowLoss : int { x_pred_x = 0, x_pred_v = 1, v_pred_v = 2, v_pred_x = 3 };

struct FlowLossArgs {
  Target target;
  DType dtype;         // of pred; everything else has the computed type
  int kind;            // FlowLoss
  bool backward;       // false: losses from pred; true: residual gradient from grad
  const void* pred;    // (batch, count)
  const void* x_1;     // (batch, count)
  const void* other;   // (batch, count): x_0 for v_pred_v, x_t for v_pred_x, else null
  const void* t;       // (batch)
  const void* grad;    // (batch): gradient of the losses, backward only
  void* out;           // forward: losses (batch); backward: gradient of pred (batch, count), pred's dtype
  void* out_residual;  // backward: gradient of the residual (batch, count), computed type, or null
  void* partials;      // CUDA forward: batch * blocks computed elements
  int64_t batch, count;
  Real sigma_min;
};

// Per item: residual = a * pred - x_1 + b * other, loss = mean((w * residual)^2).
template <class A> struct FlowLossItem { A a, b, w; };

template <class A>
WF_HD FlowLossItem<A> flow_loss_item(int kind, A t, A sigma_min) {
  const A rest = A(1) - t;
  if (kind == int(FlowLoss::x_pred_v)) return {A(1), A(0), A(1) / (rest > A(1e-6) ? rest : A(1e-6))};
  if (kind == int(FlowLoss::v_pred_v)) return {A(1), A(1) - sigma_min, A(1)};
  if (kind == int(FlowLoss::v_pred_x)) return {rest, A(1), A(1)};
  return {A(1), A(0), A(1)};
}

template <class A>
WF_HD A flow_loss_residual(FlowLossItem<A> item, A pred, A x_1, A other) {
  return (item.a * pred - x_1) + item.b * other;
}

void flow_loss_cpu(const FlowLossArgs& args);
void flow_loss_cuda(const FlowLossArgs& args);

}  // namespace wavflow
