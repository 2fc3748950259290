// The training mix x_t = (1 - (1 - sigma_min) t) x_0 + t x_1, with x_0 given or drawn.
#pragma once

#include "args.h"
#include "random.h"

namespace wavflow {

struct FlowMixArgs {
  Target target;
  DType dtype;           // of x_1 and x_t
  const void* x_1;       // (batch, count)
  const void* t;         // (batch), computed type
  const void* noise;     // (batch, count), computed type, or null: drawn from seeds
  const int64_t* seeds;  // (batch) or null
  void* x_t;             // (batch, count)
  void* x_0;             // (batch, count), computed type; null when noise is given
  int64_t batch, count;
  int64_t offset;  // of the first element in its stream of normals, a multiple of 4
  Real sigma_min, noise_scale;
};

template <class A>
WF_HD A flow_mix_value(A x_0, A x_1, A t, A sigma_min) {
  return (A(1) - (A(1) - sigma_min) * t) * x_0 + t * x_1;
}

void flow_mix_cpu(const FlowMixArgs& args);
void flow_mix_cuda(const FlowMixArgs& args);

}  // namespace wavflow
