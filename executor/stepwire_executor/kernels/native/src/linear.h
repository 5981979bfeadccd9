// Dense linear layers, as every thread of a team computes them together.
#pragma once

#include <cstdint>

namespace stepwire {

// values: [panels][num_steps][32][2 if bf16 else 1], zero-padded; the fields' order is known to
// kernels/layer_program/structures.py.
struct DenseWeight {
  const void* values;
  int64_t dtype, num_steps, out_features;
  int64_t chain_steps;  // steps that are summed in float32; such sums are then added in float64
};

// Whether rows for bf16 weights are bf16 rather than float32; rows for others are float32.
bool linear_takes_bf16();

// out[row][n] = sum over k of x[row][k] weight[n][k], plus bias[n]; bias may be null. Rows of x and
// of out are strides apart; those of x hold num_steps * (2 if the weight is bf16 else 1) values.
// All threads of a team call it (one alone outside a parallel region) and return when it is done.
void multiply(const DenseWeight& weight, const void* x, int64_t x_stride, const void* bias,
              int64_t bias_dtype, void* out, int64_t out_stride, int64_t out_dtype,
              int64_t num_rows);

}  // namespace stepwire
