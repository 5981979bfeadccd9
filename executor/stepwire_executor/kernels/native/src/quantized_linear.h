// Linear layers over weights in integers of 4 or 8 bits; see quantized_linear.cpp.
#pragma once

#include <cstdint>

namespace stepwire {

namespace quantized {
constexpr int PANEL = 32;  // outputs
constexpr int BLOCK = 32;  // inputs that are rounded to codes together
constexpr int DEPTH = 4;   // inputs in a step
}  // namespace quantized

// What the codes of a group are counted from.
enum OffsetKind : int64_t {
  ONE_ZERO = 0,     // QuantizedWeight::zero, for the whole weight
  GROUP_ZEROS = 1,  // a u8 a group and output
  MINIMUMS = 2,     // a float a group and output: what code 0 stands for
};

// A weight in panels of 32 outputs, zero-padded. The fields' order is known to
// kernels/linear/quantized_cpu.py.
struct QuantizedWeight {
  // 4 bits: [panels][blocks][4 pairs of steps][32][4], the even step's in the low halves of the
  // bytes. 8 bits: [panels][blocks][8 steps][32][4]. Unsigned; aligned to a cache line.
  const void* codes;
  const void* scales;   // [panels][groups][32] of scale_dtype
  const void* offsets;  // [panels][groups][32] of u8 or offset_dtype; null with ONE_ZERO
  // [in_features]: which of x's columns is the weight's input k; null is k itself.
  const int64_t* input_order;
  int64_t bits, group_size;  // group_size: a multiple of 32
  int64_t scale_dtype, offset_kind, offset_dtype, zero;
  int64_t out_features, in_features;
  // Blocks that are summed in float32; such sums and the bias are then added in float64.
  int64_t chain_blocks;
};

// out[row][n] = sum over k of x[row][k] weight[n][k], plus bias[n], x's blocks being rounded to 8
// bits. x: float32, bf16 or f16. out: float32, bf16, f16 or float64. Strides are in elements.
// All threads of a team call it (one alone outside a parallel region) and return when it is done.
void multiply(const QuantizedWeight& weight, const void* x, int64_t x_stride, int64_t x_dtype,
              const void* bias, int64_t bias_dtype, void* out, int64_t out_stride,
              int64_t out_dtype, int64_t num_rows);

// The same with a team of its own.
void quantized_linear(const QuantizedWeight& weight, const void* x, int64_t x_stride,
                      int64_t x_dtype, const void* bias, int64_t bias_dtype, void* out,
                      int64_t out_stride, int64_t out_dtype, int64_t num_rows,
                      int64_t num_threads);

}  // namespace stepwire
