// Row-wise operations: normalisation, gated activation, rotary embedding with the cache write.

#include <algorithm>

#include "parallel.h"
#include "vec.h"

namespace stepwire {
namespace {

// Below this many elements waking other threads costs more than it saves.
constexpr int64_t PARALLEL_ELEMENTS = 32768;
// After 1, as in reference.py.
constexpr float KEY_SCALE_FACTORS[] = {1.189207115f, 1.414213562f, 1.681792831f};

int threads_for(int64_t num_elements, int64_t num_threads) {
  return num_elements < PARALLEL_ELEMENTS ? 1 : static_cast<int>(num_threads);
}

struct NormCall {
  const void* x;
  int64_t outer_stride, inner_stride;
  const void* weight;
  void* residual;
  void* out;
  float eps;
  int64_t num_outer, num_inner, size;
  int num_threads;
};

template <class T, class Weight>
void rms_norm(const NormCall& call) {
  const int64_t num_rows = call.num_outer * call.num_inner;
#pragma omp parallel for num_threads(call.num_threads) schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) {
    const T* x = static_cast<const T*>(call.x) + row / call.num_inner * call.outer_stride +
                 row % call.num_inner * call.inner_stride;
    T* out = static_cast<T*>(call.out) + row * call.size;
    const auto* weight = static_cast<const Weight*>(call.weight);
    vf squares[2] = {};
    if (call.residual) {
      T* residual = static_cast<T*>(call.residual) + row * call.size;
      for_vectors(call.size, [&](int64_t, auto get, auto put) {
        put(residual, get(residual) + get(x));
      });
      x = residual;
    }
    for_vectors(call.size, [&](int64_t i, auto get, auto) {
      const vf value = get(x);
      vf& acc = squares[i / W % 2];
      acc = fma(value, value, acc);
    });
    const float mean = sum(squares[0] + squares[1]) / static_cast<float>(call.size);
    const float scale = 1.0f / std::sqrt(mean + call.eps);
    for_vectors(call.size, [&](int64_t, auto get, auto put) {
      put(out, get(x) * scale * get(weight));
    });
  }
}

template <class T>
void silu_and_mul(const T* x, int64_t stride, T* out, int64_t num_rows, int64_t size,
                  int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) {
    const T* gate = x + row * stride;
    const T* up = gate + size;
    T* to = out + row * size;
    for_vectors(size, [&](int64_t, auto get, auto put) {
      const vf g = get(gate);
      put(to, g / (exp(-g) + 1.0f) * get(up));
    });
  }
}

struct RopeCall {
  void* query;
  const void* key;
  const void* value;
  int64_t query_strides[2], key_strides[2], value_strides[2];  // token, head
  const float* cos_sin;
  const int64_t* positions;
  const int64_t* slots;
  void* key_pages;
  void* value_pages;
  bf16* key_scales;
  bf16* value_scales;
  const float* key_offset;  // [num_kv_heads, head_dim], of keys with scales, or null
  int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, block_size;
  int64_t mixing_size;  // elements that are mixed, a power of two; 1: none
  float min_amax;
  float static_key_scale, static_value_scale;  // of e4m3 pages without scales
  int num_threads;
};

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

template <class T, class Page>
void rope_and_write_kv(const RopeCall& call) {
  const int64_t half = call.rotary_dim / 2;
#pragma omp parallel num_threads(call.num_threads)
  {
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(call.head_dim);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < call.num_tokens; ++token) {
      const float* cos_sin = call.cos_sin + call.positions[token] * call.rotary_dim;
      for (int64_t head = 0; head < call.num_heads; ++head) {
        T* query = static_cast<T*>(call.query) + token * call.query_strides[0] +
                   head * call.query_strides[1];
        widen_row(query, row, call.head_dim);
        rotate(row, cos_sin, half);
        mix(row, call.head_dim, call.mixing_size);
        narrow_row(row, query, call.head_dim);
      }
      const int64_t slot = call.slots[token];
      if (slot < 0) continue;
      const int64_t block = slot / call.block_size, offset = slot % call.block_size;
      for (int64_t head = 0; head < call.num_kv_heads; ++head) {
        const int64_t vector = (block * call.num_kv_heads + head) * call.block_size + offset;
        const T* key = static_cast<const T*>(call.key) + token * call.key_strides[0] +
                       head * call.key_strides[1];
        widen_row(key, row, call.head_dim);
        rotate(row, cos_sin, half);
        if (call.key_offset) subtract(row, call.key_offset + head * call.head_dim, call.head_dim);
        mix(row, call.head_dim, call.mixing_size);
        write_row<Page>(row, call.key_pages, call.key_scales, call.static_key_scale, vector,
                        call.head_dim, call.min_amax, true);
        const T* value = static_cast<const T*>(call.value) + token * call.value_strides[0] +
                         head * call.value_strides[1];
        widen_row(value, row, call.head_dim);
        write_row<Page>(row, call.value_pages, call.value_scales, call.static_value_scale, vector,
                        call.head_dim, call.min_amax, false);
      }
    }
  }
}

template <class T>
void dispatch_pages(const RopeCall& call, int64_t page_dtype) {
  switch (page_dtype) {
    case F32: return rope_and_write_kv<T, float>(call);
    case BF16: return rope_and_write_kv<T, bf16>(call);
    case F16: return rope_and_write_kv<T, f16>(call);
    case E4M3: return rope_and_write_kv<T, e4m3>(call);
  }
}

template <class T>
void dispatch_weight(const NormCall& call, int64_t weight_dtype) {
  if (weight_dtype == F32)
    rms_norm<T, float>(call);
  else
    rms_norm<T, T>(call);
}

}  // namespace
}  // namespace stepwire

// x: [num_outer, num_inner, size] with the strides given; residual (may be null) and out are
// contiguous. weight_dtype is dtype or float32.
extern "C" void stepwire_rms_norm(const void* x, int64_t outer_stride, int64_t inner_stride,
                                  int64_t dtype, const void* weight, int64_t weight_dtype,
                                  void* residual, void* out, float eps, int64_t num_outer,
                                  int64_t num_inner, int64_t size, int64_t num_threads) {
  using namespace stepwire;
  const NormCall call{x,   outer_stride, inner_stride, weight,    residual,
                      out, eps,          num_outer,    num_inner, size,
                      threads_for(num_outer * num_inner * size, num_threads)};
  switch (dtype) {
    case F32: return dispatch_weight<float>(call, weight_dtype);
    case BF16: return dispatch_weight<bf16>(call, weight_dtype);
    case F16: return dispatch_weight<f16>(call, weight_dtype);
  }
}

// out[row][i] = silu(x[row][i]) * x[row][size + i]; rows of x are stride elements apart.
extern "C" void stepwire_silu_and_mul(const void* x, int64_t stride, int64_t dtype, void* out,
                                      int64_t num_rows, int64_t size, int64_t num_threads) {
  using namespace stepwire;
  const int threads = threads_for(num_rows * size, num_threads);
  switch (dtype) {
    case F32:
      return silu_and_mul(static_cast<const float*>(x), stride, static_cast<float*>(out),
                          num_rows, size, threads);
    case BF16:
      return silu_and_mul(static_cast<const bf16*>(x), stride, static_cast<bf16*>(out), num_rows,
                          size, threads);
    case F16:
      return silu_and_mul(static_cast<const f16*>(x), stride, static_cast<f16*>(out), num_rows,
                          size, threads);
  }
}

// Strides are in elements, of tokens and heads. Returns 0, 1 if a position lies outside cos_sin
// or 2 if a slot lies outside the pages; nothing is written then. Scales are null unless pages are
// e4m3 with a scale a token; without them e4m3 pages hold multiples of the static scales, and
// key_offset, which may be null anyway, is null.
extern "C" int64_t stepwire_rope_and_write_kv(
    void* query, int64_t query_token_stride, int64_t query_head_stride, const void* key,
    int64_t key_token_stride, int64_t key_head_stride, const void* value,
    int64_t value_token_stride, int64_t value_head_stride, int64_t dtype, const float* cos_sin,
    int64_t max_positions, int64_t rotary_dim, const int64_t* positions, const int64_t* slots,
    void* key_pages, void* value_pages, void* key_scales, void* value_scales,
    const float* key_offset, int64_t page_dtype, int64_t num_slots, int64_t block_size, int64_t num_tokens,
    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t mixing_size,
    float min_amax, float static_key_scale, float static_value_scale, int64_t num_threads) {
  using namespace stepwire;
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (positions[token] < 0 || positions[token] >= max_positions) return 1;
    if (slots[token] >= num_slots) return 2;
  }
  const RopeCall call{query,
                      key,
                      value,
                      {query_token_stride, query_head_stride},
                      {key_token_stride, key_head_stride},
                      {value_token_stride, value_head_stride},
                      cos_sin,
                      positions,
                      slots,
                      key_pages,
                      value_pages,
                      static_cast<bf16*>(key_scales),
                      static_cast<bf16*>(value_scales),
                      key_offset,
                      num_tokens,
                      num_heads,
                      num_kv_heads,
                      head_dim,
                      rotary_dim,
                      block_size,
                      mixing_size,
                      min_amax,
                      static_key_scale,
                      static_value_scale,
                      threads_for(num_tokens * (num_heads + 2 * num_kv_heads) * head_dim,
                                  num_threads)};
  switch (dtype) {
    case F32: dispatch_pages<float>(call, page_dtype); break;
    case BF16: dispatch_pages<bf16>(call, page_dtype); break;
    case F16: dispatch_pages<f16>(call, page_dtype); break;
  }
  return 0;
}
