// Convolution over tokens, channels last, in float32: the product and the gradient of its weight.
//
// A token's window of k tokens is one contiguous row of k c values, so the convolution is a matrix
// product whose left rows overlap in memory: nothing is unfolded.
#pragma once

#include "args.h"

namespace wavflow {

constexpr int64_t kPanel = 16;  // output channels that packed weights hold side by side

// (outputs / kPanel rounded up, width channels, kPanel): element (panel, j channels + q, r) is
// weight[(panel kPanel + r) output_stride + q channel_stride + j tap_stride], 0 beyond the outputs.
struct PackArgs {
  Target target;
  const float* weight;
  int64_t output_stride, channel_stride, tap_stride;
  float* out;
  int64_t outputs, channels, width;
};

struct ConvArgs {
  Target target;
  const float* x;       // (batch, tokens, channels)
  const float* packed;  // PackArgs
  const float* bias;    // (outputs) or null
  float* out;           // (batch, tokens, outputs)
  int64_t batch, tokens, channels, outputs, width;
};

struct WeightGradientArgs {
  Target target;
  const float* grad;  // (batch, tokens, outputs)
  const float* x;     // (batch, tokens, channels)
  float* out;         // (outputs, channels, width)
  int64_t batch, tokens, channels, outputs, width;
};

void conv1d_pack_cpu(const PackArgs& args);
void conv1d_cpu(const ConvArgs& args);
void conv1d_weight_gradient_cpu(const WeightGradientArgs& args);

}  // namespace wavflow
