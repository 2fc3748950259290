// Projections of several streams to joint, normalised and rotated queries and keys, and values.
#pragma once

#include <vector>

#include "args.h"

namespace wavflow {

// One stream. A token's row is (heads, d, parts), parts = {q, k, v} or {k, v}, fastest.
struct QkvRopeStream {
  const void* x;             // (batch, tokens, heads * d * parts), rows contiguous
  const void* q_weight;      // (d), of the computed type
  const void* k_weight;      // (d)
  void* d_x;                 // backward: as x, contiguous
  void* d_q_weight;          // backward: (d)
  void* d_k_weight;          // backward: (d)
  int64_t tokens, parts;     // parts: 3, or 2 without queries
  int64_t batch_stride, token_stride;  // of x, in elements
};

struct QkvRopeArgs {
  Target target;
  DType dtype;  // of x, q, k, v; weights and rope have the computed type
  bool backward;
  std::vector<QkvRopeStream> streams;  // those with queries first
  const void* rope;  // (sum of tokens, d): cos, sin interleaved
  void* q;           // (batch, heads, tokens with queries, d): outputs, or their gradients in backward
  void* k;           // (batch, heads, sum of tokens, d)
  void* v;           // likewise
  int64_t batch, heads, d;
};

// float32's machine epsilon, in every precision.
template <class A> WF_HD A qkv_rope_inverse_rms(A sum_of_squares, int64_t d) {
  return A(1) / square_root(sum_of_squares / A(d) + A(1.1920928955078125e-07));
}

void qkv_rope_cpu(const QkvRopeArgs& args);

}  // namespace wavflow
