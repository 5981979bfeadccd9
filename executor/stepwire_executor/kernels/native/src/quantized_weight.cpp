// Weights in integers of 4 or 8 bits: laying them out in panels, and reading them back.

#include "parallel.h"
#include "quantized_linear.h"
#include "vec.h"

namespace stepwire {
namespace {

using namespace quantized;

// A word of an output's codes, as QuantizedWeight says.
inline uint32_t word_of(const uint8_t* codes, int64_t bits) {
  uint32_t word = 0;
  if (bits == 8)
    std::memcpy(&word, codes, sizeof word);
  else
    for (int i = 0; i < 4; ++i)
      word |= static_cast<uint32_t>(codes[2 * i] | codes[2 * i + 1] << 16) << (4 * i);
  return word;
}

// The i-th code of a word.
inline int32_t code_of(uint32_t word, int64_t bits, int64_t i) {
  return bits == 8 ? word >> (8 * i) & 255 : word >> (i / 2 * 4 + i % 2 * 16) & 15;
}

inline float value_of(const void* p, int64_t dtype, int64_t place) {
  switch (dtype) {
    case F16: return load_first(static_cast<const f16*>(p) + place, 1)[0];
    case BF16: return widen(static_cast<const bf16*>(p)[place]);
    default: return static_cast<const float*>(p)[place];
  }
}

// One output's weights in float32, in the order of its codes.
void dequantize_output(const QuantizedWeight& weight, int64_t n, float* values) {
  const int64_t num_groups = weight.in_features / weight.group_size;
  const int64_t lane = n % PANEL, word_inputs = 32 / weight.bits;
  const auto* group = static_cast<const uint8_t*>(weight.data) +
                      n / PANEL * num_groups * group_bytes(weight);
  for (int64_t g = 0; g < num_groups; ++g, group += group_bytes(weight)) {
    const float scale = value_of(group, weight.scale_dtype, lane);
    const uint8_t* offsets = group + scale_bytes(weight);
    const bool has_minimum = weight.offset_kind == MINIMUMS;
    const float minimum = has_minimum ? value_of(offsets, weight.offset_dtype, lane) : 0.0f;
    const int32_t zero = has_minimum                          ? 0
                         : weight.offset_kind == GROUP_ZEROS ? offsets[lane]
                                                             : static_cast<int32_t>(weight.zero);
    const uint8_t* words = group + header_bytes(weight);
    for (int64_t k = 0; k < weight.group_size; ++k) {
      uint32_t word;
      std::memcpy(&word, words + (k / word_inputs * PANEL + lane) * sizeof word, sizeof word);
      const int32_t code = code_of(word, weight.bits, k % word_inputs);
      const float product = static_cast<float>(code - zero) * scale;
      *values++ = has_minimum ? product + minimum : product;
    }
  }
}

}  // namespace
}  // namespace stepwire

// Lays codes, contiguous [out_features][in_features], out in the words of weight.data, which has
// room for whole panels.
extern "C" void stepwire_pack_codes(const stepwire::QuantizedWeight* weight, const uint8_t* codes,
                                    int64_t num_threads) {
  using namespace stepwire;
  const int64_t bits = weight->bits, size = weight->in_features;
  const int64_t word_inputs = 32 / bits, group_words = weight->group_size / word_inputs;
  const int64_t num_groups = size / weight->group_size;
  const int64_t num_panels = (weight->out_features + PANEL - 1) / PANEL;
  auto* data = static_cast<uint8_t*>(const_cast<void*>(weight->data));
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t lane = 0; lane < PANEL; ++lane) {
      const int64_t n = panel * PANEL + lane;
      const uint8_t* source = codes + n * size;
      for (int64_t g = 0; g < num_groups; ++g) {
        uint8_t* words =
            data + (panel * num_groups + g) * group_bytes(*weight) + header_bytes(*weight);
        for (int64_t i = 0; i < group_words; ++i, source += word_inputs) {
          const uint32_t word = n < weight->out_features ? word_of(source, bits) : 0;
          std::memcpy(words + (i * PANEL + lane) * sizeof word, &word, sizeof word);
        }
      }
    }
  }
}

// out[i] = the weights of output rows[i] in float32, rounded to out_dtype (float32, bf16, f16);
// out is contiguous. Returns 0, and leaves out as it is, where a row is not an output.
extern "C" int64_t stepwire_quantized_rows(const stepwire::QuantizedWeight* weight,
                                           const int64_t* rows, int64_t num_rows, void* out,
                                           int64_t out_dtype, int64_t num_threads) {
  using namespace stepwire;
  for (int64_t i = 0; i < num_rows; ++i)
    if (rows[i] < 0 || rows[i] >= weight->out_features) return 0;
  const int64_t size = weight->in_features;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows > 4)
  for (int64_t i = 0; i < num_rows; ++i) {
    static thread_local Scratch scratch;
    float* values = scratch.get<float>(2 * size);
    dequantize_output(*weight, rows[i], values);
    if (const int64_t* order = weight->input_order) {
      float* ordered = values + size;
      for (int64_t k = 0; k < size; ++k) ordered[order[k]] = values[k];
      values = ordered;
    }
    for_vectors(size, [&](int64_t, auto load_from, auto store_to) {
      const vf row = load_from(values);
      switch (out_dtype) {
        case F32: store_to(static_cast<float*>(out) + i * size, row); break;
        case BF16: store_to(static_cast<bf16*>(out) + i * size, row); break;
        case F16: store_to(static_cast<f16*>(out) + i * size, row); break;
      }
    });
  }
  return 1;
}
