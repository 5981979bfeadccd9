// Linear layers over weights in integers of 4 or 8 bits; see quantized_linear.cpp.
#pragma once

#include <cstdint>

#include "vec.h"

namespace stepwire {

// What the codes of a group are counted from.
enum OffsetKind : int64_t {
  ONE_ZERO = 0,     // QuantizedWeight::zero, for the whole weight
  GROUP_ZEROS = 1,  // a u8 a group and output
  MINIMUMS = 2,     // a float a group and output: what code 0 stands for
};

// A weight in panels of 32 outputs, zero-padded. The fields' order is known to
// kernels/linear/quantized_cpu.py.
struct QuantizedWeight {
  // [panels][groups] of: scales, [32] of scale_dtype; offsets, [32] of u8 or offset_dtype, none
  // with ONE_ZERO; words of codes, [group_size / inputs in a word][32] of u32. One thread reads
  // them front to back. Of a word of 4-bit codes, which holds 8 inputs, the lower half has those of
  // even inputs and the upper half those of odd ones, from the low bits on; a word of 8-bit codes
  // holds 4 inputs in order.
  const void* data;
  // [in_features]: which of x's columns is the weight's input k; null is k itself.
  const int64_t* input_order;
  int64_t bits, group_size;  // group_size: a multiple of 32
  int64_t scale_dtype, offset_kind, offset_dtype;
  int64_t zero;  // 0 unless there is one for all
  int64_t out_features, in_features;
  // Inputs, in blocks of 32, that are summed in float32; such sums and the bias are then added in
  // float64.
  int64_t chain_blocks;
};

namespace quantized {

constexpr int PANEL = 32;  // outputs
constexpr int BLOCK = 32;  // inputs

constexpr int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : dtype == F64 ? 8 : 2; }

// Bytes of a panel's group: of scales, of scales and offsets, of all.
inline int64_t scale_bytes(const QuantizedWeight& w) { return PANEL * size_of(w.scale_dtype); }
inline int64_t header_bytes(const QuantizedWeight& w) {
  const int64_t offset_size = w.offset_kind == ONE_ZERO      ? 0
                              : w.offset_kind == GROUP_ZEROS ? 1
                                                             : size_of(w.offset_dtype);
  return scale_bytes(w) + PANEL * offset_size;
}
inline int64_t group_bytes(const QuantizedWeight& w) {
  return header_bytes(w) + PANEL * w.group_size * w.bits / 8;
}

}  // namespace quantized

// out[row][n] = sum over k of x[row][k] weight[n][k], plus bias[n]. x: float32, bf16 or f16. out:
// float32, bf16, f16 or float64. Strides are in elements.
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
