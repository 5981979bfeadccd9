// Rotary embedding of queries and keys, and the write of keys and values into their pages.

#include <algorithm>

#include "parallel.h"
#include "row_operations.h"

namespace stepwire {
namespace {

// After 1, as in reference.py.
constexpr float KEY_SCALE_FACTORS[] = {1.189207115f, 1.414213562f, 1.681792831f};

void rotate(float* x, const float* cos_sin, int64_t half) {
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
  float* second = x + half;
  for_vectors(half, [&](int64_t, auto get, auto put) {
    const vf a = get(x), b = get(second), c = get(cosine), s = get(sine);
    put(x, fma(a, c, -(b * s)));
    put(second, fma(b, c, a * s));
  });
}

void subtract(float* x, const float* offset, int64_t n) {
  for_vectors(n, [&](int64_t, auto get, auto put) { put(x, get(x) - get(offset)); });
}

// Multiplies each stretch of size elements by the Hadamard matrix over sqrt(size).
void mix(float* x, int64_t n, int64_t size) {
  if (size == 1) return;
  for (int64_t stride = 1; stride < size; stride *= 2)
    for (int64_t start = 0; start < n; start += 2 * stride)
      for (int64_t i = start; i < start + stride; ++i) {
        const float a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
  const float factor = 1.0f / std::sqrt(static_cast<float>(size));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

template <class T>
void widen_row(const T* from, float* to, int64_t n) {
  for_vectors(n, [&](int64_t, auto get, auto put) { put(to, get(from)); });
}

template <class T>
void narrow_row(const float* from, T* to, int64_t n) {
  for_vectors(n, [&](int64_t, auto get, auto put) { put(to, get(from)); });
}

// Squared error of a row that is rounded to multiples of scale.
float rounding_error(const float* from, int64_t n, float scale) {
  vf errors = {};
  for_vectors(n, [&](int64_t, auto get, auto) {
    const vf x = get(from) / scale;
    const vf error = widen(narrow(x, e4m3{}), e4m3{}) - x;
    errors = fma(error, error, errors);
  });
  return sum(errors) * (scale * scale);
}

// The scale of a vector, NaN unless all of it is finite: the least, or the best of some multiples.
bf16 scale_of_row(const float* from, int64_t n, float min_amax, bool is_key) {
  vf amax = {};
  for_vectors(n, [&](int64_t, auto get, auto) {
    const vf magnitude = (vf)((vu)get(from) & 0x7fffffff);
    amax = max(amax, magnitude < INF ? magnitude : splat(INF));
  });
  const float largest_one = largest(amax);
  if (!(largest_one < INF)) return {0x7fc0};
  const float least = std::max(largest_one, min_amax) / 448.0f;
  bf16 best = round_up(least);
  if (!is_key) return best;
  float best_error = rounding_error(from, n, widen(best));
  for (const float factor : KEY_SCALE_FACTORS) {
    const bf16 scale = round_up(least * factor);
    const float error = rounding_error(from, n, widen(scale));
    if (error < best_error) {
      best = scale;
      best_error = error;
    }
  }
  return best;
}

// The division rounds as the reference's does. What is not finite becomes NaN: an infinity that
// saturated would pass for a number.
void quantise_row(const float* from, e4m3* to, int64_t n, float scale) {
  for_vectors(n, [&](int64_t, auto get, auto put) {
    const vf x = get(from);
    const vf magnitude = (vf)((vu)x & 0x7fffffff);
    put(to, magnitude < INF ? x / scale : splat(std::numeric_limits<float>::quiet_NaN()));
  });
}

template <class Page>
void write_row(const float* from, void* pages, bf16* scales, float static_scale, int64_t vector,
               int64_t n, float min_amax, bool is_key) {
  Page* to = static_cast<Page*>(pages) + vector * n;
  if constexpr (std::is_same_v<Page, e4m3>) {
    if (scales) scales[vector] = scale_of_row(from, n, min_amax, is_key);
    quantise_row(from, to, n, scales ? widen(scales[vector]) : static_scale);
  } else {
    narrow_row(from, to, n);
  }
}

// Where a token's head begins.
inline int64_t head_at(const int64_t strides[2], int64_t token, int64_t head) {
  return token * strides[0] + head * strides[1];
}

template <class T, class Page>
void turn_and_write(const RopeCall& call) {
  const int64_t half = call.rotary_dim / 2, n = call.head_dim;
  const int64_t num_heads = call.num_heads, num_kv_heads = call.num_kv_heads;
  static thread_local Scratch scratch;
  float* row = scratch.get<float>(n);
  // Heads are shared out too, so that a step of one token is not one thread's.
#pragma omp for collapse(2) schedule(static)
  for (int64_t token = 0; token < call.num_tokens; ++token) {
    for (int64_t index = 0; index < num_heads + 2 * num_kv_heads; ++index) {
      const float* cos_sin = call.cos_sin + call.positions[token] * call.rotary_dim;
      if (index < num_heads) {
        T* query = static_cast<T*>(call.query) + head_at(call.query_strides, token, index);
        widen_row(query, row, n);
        rotate(row, cos_sin, half);
        mix(row, n, call.mixing_size);
        narrow_row(row, query, n);
        continue;
      }
      const int64_t slot = call.slots[token];
      if (slot < 0) continue;
      const int64_t head = (index - num_heads) % num_kv_heads;
      const int64_t block = slot / call.block_size, offset = slot % call.block_size;
      const int64_t vector = (block * num_kv_heads + head) * call.block_size + offset;
      if (index < num_heads + num_kv_heads) {
        const T* key = static_cast<const T*>(call.key) + head_at(call.key_strides, token, head);
        widen_row(key, row, n);
        rotate(row, cos_sin, half);
        if (call.key_offset) subtract(row, call.key_offset + head * n, n);
        mix(row, n, call.mixing_size);
        write_row<Page>(row, call.key_pages, call.key_scales, call.static_key_scale, vector, n,
                        call.min_amax, true);
      } else {
        const T* value =
            static_cast<const T*>(call.value) + head_at(call.value_strides, token, head);
        widen_row(value, row, n);
        write_row<Page>(row, call.value_pages, call.value_scales, call.static_value_scale, vector,
                        n, call.min_amax, false);
      }
    }
  }
}

template <class T>
void dispatch_pages(const RopeCall& call) {
  switch (call.page_dtype) {
    case F32: return turn_and_write<T, float>(call);
    case BF16: return turn_and_write<T, bf16>(call);
    case F16: return turn_and_write<T, f16>(call);
    case E4M3: return turn_and_write<T, e4m3>(call);
  }
}

}  // namespace

RopeProblem find_problem(const RopeCall& call) {
  for (int64_t token = 0; token < call.num_tokens; ++token) {
    const int64_t position = call.positions[token];
    if (position < 0 || position >= call.max_positions) return POSITION_OUTSIDE;
    if (call.slots[token] >= call.num_slots) return SLOT_OUTSIDE;
  }
  return NO_ROPE_PROBLEM;
}

void rope_and_write_kv(const RopeCall& call) {
  switch (call.dtype) {
    case F32: return dispatch_pages<float>(call);
    case BF16: return dispatch_pages<bf16>(call);
    case F16: return dispatch_pages<f16>(call);
  }
}

}  // namespace stepwire

// Returns a RopeProblem; nothing is written where there is one.
extern "C" int64_t stepwire_rope_and_write_kv(
    void* query, int64_t query_token_stride, int64_t query_head_stride, const void* key,
    int64_t key_token_stride, int64_t key_head_stride, const void* value,
    int64_t value_token_stride, int64_t value_head_stride, int64_t dtype, const float* cos_sin,
    int64_t max_positions, int64_t rotary_dim, const int64_t* positions, const int64_t* slots,
    void* key_pages, void* value_pages, void* key_scales, void* value_scales,
    const float* key_offset, int64_t page_dtype, int64_t num_slots, int64_t block_size,
    int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
    int64_t mixing_size, float min_amax, float static_key_scale, float static_value_scale,
    int64_t num_threads) {
  using namespace stepwire;
  const RopeCall call{query,
                      key,
                      value,
                      {query_token_stride, query_head_stride},
                      {key_token_stride, key_head_stride},
                      {value_token_stride, value_head_stride},
                      dtype,
                      cos_sin,
                      max_positions,
                      rotary_dim,
                      positions,
                      slots,
                      key_pages,
                      value_pages,
                      static_cast<bf16*>(key_scales),
                      static_cast<bf16*>(value_scales),
                      key_offset,
                      page_dtype,
                      num_slots,
                      block_size,
                      num_tokens,
                      num_heads,
                      num_kv_heads,
                      head_dim,
                      mixing_size,
                      min_amax,
                      static_key_scale,
                      static_value_scale};
  const RopeProblem problem = find_problem(call);
  if (problem) return problem;
  const int64_t num_elements = num_tokens * (num_heads + 2 * num_kv_heads) * head_dim;
#pragma omp parallel num_threads(threads_for(num_elements, num_threads))
  rope_and_write_kv(call);
  return NO_ROPE_PROBLEM;
}
