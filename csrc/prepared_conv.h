// Winograd's F(2,3) over tokens: the transforms of the inputs and of the products.
//
// Two outputs of a width-3 filter g from four inputs d take four products in place of six:
// m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1 + g2) / 2, m2 = (d2 - d1) (g0 - g1 + g2) / 2,
// m3 = (d1 - d3) g2, and y0 = m0 + m1 + m2, y1 = m1 - m2 - m3. The products are summed over channels
// by a matrix multiplication of their own, between the two transforms.
#pragma once

#include "args.h"
#include "swiglu.h"

namespace wavflow {

struct WinogradWeightArgs {
  Target target;
  DType dtype;          // of the outputs
  const float* weight;  // (outputs, channels, 3): g0, g1, g2
  void* out[4];         // (outputs, channels) each: the transformed weights of m0 .. m3
  int64_t outputs, channels;
};

struct WinogradInputArgs {
  Target target;
  DType dtype;
  const void* x;  // (batch, tokens, channels); pair t reads tokens 2 t - 1 .. 2 t + 2, 0 outside
  void* out;      // (4, batch, (tokens + 1) / 2, channels)
  int64_t batch, tokens, channels;
};

struct WinogradOutputArgs {
  Target target;
  DType dtype;
  const void* product[4];  // (batch, (tokens + 1) / 2, channels)
  const void* bias;        // (channels) or null
  void* out;               // (batch, tokens, channels), or half the channels where gated
  bool gated;              // the first half of the channels, through SiLU, times the second
  int64_t batch, tokens, channels;
};

void winograd_weight_cpu(const WinogradWeightArgs& args);
void winograd_input_cpu(const WinogradInputArgs& args);
void winograd_output_cpu(const WinogradOutputArgs& args);

}  // namespace wavflow
