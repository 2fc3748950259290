// Tokens to waveform: the first samples of each item, divided by the scale.
#pragma once

#include "args.h"

namespace wavflow {

struct UnpatchifyArgs {
  Target target;
  DType dtype;
  const void* tokens;       // (batch, elements)
  void* wave;               // (batch, samples)
  int64_t batch, elements;  // elements: of an item's tokens
  int64_t samples;          // at most as many
  Real audio_scale;
};

template <class T, class A>
WF_HD T unpatchify_sample(T token, A scale) {
  return store<T>(load(token) / scale);
}

void unpatchify_cpu(const UnpatchifyArgs& args);
void unpatchify_cuda(const UnpatchifyArgs& args);

}  // namespace wavflow
