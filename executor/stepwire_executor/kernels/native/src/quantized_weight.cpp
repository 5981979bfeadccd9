// Weights in integers of 4 or 8 bits: laying them out in panels, and reading them back.

#include "parallel.h"
#include "quantized_linear.h"
#include "vec.h"

namespace stepwire {
namespace {

using namespace quantized;

// Eight codes of 4 bits that lie in two steps, as a panel holds them.
inline uint32_t pair_steps(const uint8_t* codes) {
  uint32_t even, odd;
  std::memcpy(&even, codes, DEPTH);
  std::memcpy(&odd, codes + DEPTH, DEPTH);
  return even | odd << 4;
}

// Where output n's codes of a step (8 bits) or of a pair of steps (4 bits) lie.
inline int64_t place_of(int64_t n, int64_t unit, int64_t units) {
  return ((n / PANEL * units + unit) * PANEL + n % PANEL) * DEPTH;
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
  const int64_t units = weight.in_features / DEPTH / (weight.bits == 4 ? 2 : 1);
  const auto* codes = static_cast<const uint8_t*>(weight.codes);
  for (int64_t group = 0; group < num_groups; ++group) {
    const int64_t place = (n / PANEL * num_groups + group) * PANEL + n % PANEL;
    const float scale = value_of(weight.scales, weight.scale_dtype, place);
    const bool has_minimum = weight.offset_kind == MINIMUMS;
    const float minimum =
        has_minimum ? value_of(weight.offsets, weight.offset_dtype, place) : 0.0f;
    const int32_t zero = has_minimum                          ? 0
                         : weight.offset_kind == GROUP_ZEROS
                             ? static_cast<const uint8_t*>(weight.offsets)[place]
                             : static_cast<int32_t>(weight.zero);
    for (int64_t k = group * weight.group_size; k < (group + 1) * weight.group_size; ++k) {
      const int64_t step = k / DEPTH;
      const int64_t unit = weight.bits == 4 ? step / 2 : step;
      const int32_t both = codes[place_of(n, unit, units) + k % DEPTH];
      const int32_t code = weight.bits == 8 ? both : step % 2 ? both >> 4 : both & 15;
      const float product = static_cast<float>(code - zero) * scale;
      values[k] = has_minimum ? product + minimum : product;
    }
  }
}

}  // namespace
}  // namespace stepwire

// Lays codes, contiguous [num_outputs][in_features], out as QuantizedWeight::codes says; packed
// has room for whole panels.
extern "C" void stepwire_pack_codes(const uint8_t* codes, int64_t bits, int64_t num_outputs,
                                    int64_t in_features, uint8_t* packed, int64_t num_threads) {
  using namespace stepwire;
  const int64_t unit_inputs = bits == 4 ? 2 * DEPTH : DEPTH;
  const int64_t units = in_features / unit_inputs;
  const int64_t num_panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    for (int64_t n = panel * PANEL; n < (panel + 1) * PANEL; ++n) {
      uint8_t* target = packed + place_of(n, 0, units);
      const uint8_t* source = codes + n * in_features;
      for (int64_t unit = 0; unit < units; ++unit, target += PANEL * DEPTH, source += unit_inputs) {
        uint32_t word = 0;
        if (n < num_outputs) {
          if (bits == 4)
            word = pair_steps(source);
          else
            std::memcpy(&word, source, DEPTH);
        }
        std::memcpy(target, &word, sizeof word);
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
