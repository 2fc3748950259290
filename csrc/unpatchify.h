// Tokens to waveform: unscale, flatten, trim; overlapping windows are cross-faded.
#pragma once

#include "check.h"

namespace wavflow {

struct UnpatchifyArgs {
  Target target;
  DType dtype;
  const void* tokens;  // (batch, windows, tokens_per_window, token_size)
  const void* window;  // (tokens_per_window) weights in the computed type, or null: weight 1
  void* wave;          // (batch, samples)
  int64_t batch, windows, window_tokens, token_size, hop, samples;
  Real audio_scale;
};

// Sample `p` of one item: the weighted mean of the windows that hold it, divided by the scale.
// 0 where no window with a weight other than 0 holds it.
template <class T, class A>
WF_HD A unpatchify_sample(const T* tokens, const A* window, int64_t p, const UnpatchifyArgs& a) {
  const int64_t token = p / a.token_size, channel = p % a.token_size;
  const int64_t last = token / a.hop < a.windows ? token / a.hop : a.windows - 1;
  const int64_t first = token < a.window_tokens ? 0 : (token - a.window_tokens) / a.hop + 1;
  A sum = 0, total = 0;
  for (int64_t w = first; w <= last; ++w) {
    const int64_t at = token - w * a.hop;
    const A weight = window ? window[at] : A(1);
    sum += weight * load(tokens[(w * a.window_tokens + at) * a.token_size + channel]);
    total += weight;
  }
  return total == A(0) ? A(0) : sum / total / A(a.audio_scale);
}

void unpatchify_cpu(const UnpatchifyArgs& args);
void unpatchify_cuda(const UnpatchifyArgs& args);

}  // namespace wavflow
