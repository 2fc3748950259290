// Flash attention and its backward: the arguments of a call.
#pragma once

#include "args.h"

namespace wavflow {

// A tensor (b h n d) whose channels lie side by side.
struct Heads {
  const void* data;
  int64_t b, h, n;  // strides in elements
};

// Which tokens see each other: those at most `window` apart, where the first `local` stand at 0, 1, 2
// and so on, and the next `spread` evenly over the same time. Later ones see, and are seen by, all.
// window < 0: all see all.
struct AttentionMask {
  int64_t window, local, spread;
};

struct RopeAttentionArgs {
  Target target;
  DType dtype;
  Heads q, k, v;
  void* out;  // (b, nq, h d)
  void* lse;  // (b, h, nq) computed type
  int64_t b, h, nq, n, d;
  AttentionMask mask;
};

struct RopeAttentionBackwardArgs {
  Target target;
  DType dtype;
  Heads grad;  // of out, as (b h nq d)
  Heads q, k, v, out;
  const void* lse;        // (b, h, nq) computed type
  void *d_q, *d_k, *d_v;  // (b, h, n, d)
  int64_t b, h, nq, n, d;
  AttentionMask mask;
};

void rope_attention_cpu(const RopeAttentionArgs& args);
void rope_attention_backward_cpu(const RopeAttentionBackwardArgs& args);

}  // namespace wavflow
