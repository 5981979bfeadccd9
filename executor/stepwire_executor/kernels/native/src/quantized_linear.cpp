// Linear layers over weights in integers of 4 or 8 bits.
//
// Each 32 neighbouring inputs of a row, a block, are rounded to a float32 scale and codes of 8
// bits; the two steps of 4 inputs that hold the largest get a second digit of 8 bits, and no say in
// the scale. A few inputs are far larger than the others in every model: with one scale for all
// they cost the rest of their block its precision (0.5% of perplexity, measured).
//
// A block's products are summed in integers, exactly, so that any instruction and any order
// gives the same bits. Blocks are added in float32, in order, each step rounded once:
//   zeros:    acc = fma(weight_scale * x_scale, float(dot - zero * sum), acc)
//   minimums: acc = fma(weight_scale * x_scale, float(dot), acc),
//             then fma(minimum, x_scale * sum, acc)
// with dot the sum of products of codes and sum that of x's codes. As in linear.cpp, an output is
// one such chain or several of a fixed length, added in float64, whatever the number of rows and
// threads.

#include "quantized_linear.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"
#include "vec.h"

namespace stepwire {
namespace {

using namespace quantized;

constexpr int STEPS = BLOCK / DEPTH;
constexpr int WIDE = 2;  // steps of a block with two digits
constexpr int DIGIT = 7;  // bits of the lower one
constexpr int V = 2;  // vectors of outputs that are computed together
// Rows that fit in registers: as many sums of integers as of floats, V of each a row.
#ifdef STEPWIRE_AVX512
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 2;
#endif
// Of which so many are multiplied side by side: one row's sum waits for itself, and sums of more
// would not fit in registers beside a block of codes.
constexpr int TOGETHER = 2;
// So few are quantised by each thread for itself, which takes less than a barrier.
constexpr int64_t FEW_ROWS = 2;
// Of quantised rows that are worked on together: half of a second-level cache of 1 MiB.
constexpr int64_t TILE_BYTES = 512 << 10;
// Below the smallest such magnitude a block counts as zero: 127 / base must not overflow.
constexpr float TINY = 0x1p-100f;

// MAX_ROWS rows' codes of one block of inputs, and what their products are scaled with.
struct Rows {
  int8_t codes[STEPS][MAX_ROWS][DEPTH];   // the lower digits
  int8_t upper[WIDE][MAX_ROWS][DEPTH];    // of the wide steps
  uint8_t wide_steps[WIDE][MAX_ROWS];
  float scales[MAX_ROWS];
  union {
    int32_t starts[MAX_ROWS];  // ONE_ZERO: -zero * sum; GROUP_ZEROS: sum
    float sums[MAX_ROWS];      // MINIMUMS: scale * sum
  };
};

// Integer sums of products of unsigned codes and x's.
#if defined(STEPWIRE_AVX512) && defined(__AVX512VNNI__)

template <int BITS>
struct Dot {
  vi sum;
  void start(int32_t value) { sum = value + vi{}; }
  void add(vu codes, const int8_t* x) {
    uint32_t four;
    std::memcpy(&four, x, sizeof four);
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)splat(four));
  }
  vi total() const { return sum; }
};

#else

typedef int16_t vs __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));

// Pairs of products, which must fit in 16 bits: those of a whole block of 4-bit codes do.
inline vs multiply_pairs(vu codes, vu x) {
#ifdef STEPWIRE_AVX512
  return (vs)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
#else
  return (vs)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
#endif
}

inline vi add_pairs(vs x) {
#ifdef STEPWIRE_AVX512
  return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#else
  return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#endif
}

template <int BITS>
struct Dot {
  int32_t first;
  vs low, high;  // of the codes' halves
  void start(int32_t value) {
    first = value;
    low = high = vs{};
  }
  void add(vu codes, const int8_t* x) {
    uint32_t four;
    std::memcpy(&four, x, sizeof four);
    if (BITS == 8) {
      high += multiply_pairs((codes >> 4) & 0x0f0f0f0f, splat(four));
      codes &= 0x0f0f0f0f;
    }
    low += multiply_pairs(codes, splat(four));
  }
  vi total() const {
    const vi sum = BITS == 8 ? add_pairs(low) + (add_pairs(high) << 4) : add_pairs(low);
    return sum + first;
  }
};

#endif

// The n-th vector of W values of a dtype.
inline vf load_scales(const void* p, int64_t dtype, int64_t n) {
  switch (dtype) {
    case F16: return load(static_cast<const f16*>(p) + n * W);
    case BF16: return load(static_cast<const bf16*>(p) + n * W);
    default: return load(static_cast<const float*>(p) + n * W);
  }
}

inline vi load_zeros(const void* p, int64_t n) {
  return __builtin_convertvector(load_as<vb>(static_cast<const uint8_t*>(p) + n * W), vi);
}

constexpr int64_t size_of(int64_t dtype) { return dtype == F32 ? 4 : dtype == F64 ? 8 : 2; }

// Each four lanes' largest, in all four.
inline vi largest_of_steps(vi x) {
#ifdef STEPWIRE_AVX512
  const vi swapped = (vi)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_CDAB);
  x = swapped > x ? swapped : x;
  const vi halves = (vi)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_BADC);
#else
  const vi swapped = (vi)_mm256_shuffle_epi32((__m256i)x, 0xb1);
  x = swapped > x ? swapped : x;
  const vi halves = (vi)_mm256_shuffle_epi32((__m256i)x, 0x4e);
#endif
  return halves > x ? halves : x;
}

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t sum_lanes(vi x) {
#ifdef STEPWIRE_AVX512
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t lanes[W];
  store_as(lanes, x);
  return std::accumulate(lanes, lanes + W, 0);
#endif
}

struct Call {
  const QuantizedWeight& weight;
  const void* x;
  int64_t x_stride, x_dtype;
  const void* bias;
  int64_t bias_dtype;
  void* out;
  int64_t out_stride, out_dtype;
  int64_t num_rows, num_blocks;
};

// Rounds a block. One that holds what is not finite gets a scale of NaN.
template <class T>
void quantize_block(const T* x, Rows& block, int row, const QuantizedWeight& weight) {
  constexpr int N = BLOCK / W;
  vf values[N];
  int32_t largest[BLOCK];  // magnitudes, whose bits are ordered as they are; NaN is above infinity
  for (int i = 0; i < N; ++i) {
    values[i] = load(x + i * W);
    store_as(largest + i * W, largest_of_steps((vi)values[i] & 0x7fffffff));
  }
  // The WIDE largest steps, the first of equal ones, and the largest of the others.
  int32_t tops[WIDE + 1];
  int wide[WIDE + 1];
  for (int t = 0; t <= WIDE; ++t) {
    tops[t] = -1;
    for (int step = 0; step < STEPS; ++step)
      if (largest[step * DEPTH] > tops[t]) {
        tops[t] = largest[step * DEPTH];
        wide[t] = step;
      }
    if (t < WIDE) largest[wide[t] * DEPTH] = -1;
  }
  const float amax = as_float(tops[0]);
  const bool is_finite = amax < INF;
  const bool is_zero = amax < TINY;
  const float base = std::max(as_float(tops[WIDE]), amax * (1.0f / (1 << DIGIT)));
  const float inverse = is_finite && !is_zero ? 127.0f / base : 0.0f;
  const float scale = !is_finite ? std::numeric_limits<float>::quiet_NaN()
                      : is_zero  ? 0.0f
                                 : base / 127.0f;
  int32_t codes[BLOCK];
  vi sums = {};
  for (int i = 0; i < N; ++i) {
    const vi rounded = to_int(round_even(is_finite ? values[i] * inverse : vf{}));
    sums += rounded;
    store_as(codes + i * W, rounded);
  }
  for (int t = 0; t < WIDE; ++t) {
    block.wide_steps[t][row] = static_cast<uint8_t>(wide[t]);
    for (int d = 0; d < DEPTH; ++d) {
      int32_t& code = codes[wide[t] * DEPTH + d];
      const int32_t upper = (code + (1 << (DIGIT - 1))) >> DIGIT;
      block.upper[t][row][d] = static_cast<int8_t>(upper);
      code -= upper * (1 << DIGIT);
    }
  }
  for (int step = 0; step < STEPS; ++step)
    for (int d = 0; d < DEPTH; ++d)
      block.codes[step][row][d] = static_cast<int8_t>(codes[step * DEPTH + d]);
  const int32_t sum = sum_lanes(sums);
  block.scales[row] = scale;
  switch (weight.offset_kind) {
    case ONE_ZERO: block.starts[row] = -static_cast<int32_t>(weight.zero) * sum; break;
    case GROUP_ZEROS: block.starts[row] = sum; break;
    case MINIMUMS: block.sums[row] = scale * static_cast<float>(sum); break;
  }
}

template <class T>
void quantize_row(const Call& call, int64_t row, Rows* blocks, int place) {
  const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
  const int64_t* order = call.weight.input_order;
  for (int64_t block = 0; block < call.num_blocks; ++block, x += order ? 0 : BLOCK) {
    if (!order) {
      quantize_block(x, blocks[block], place, call.weight);
      continue;
    }
    T gathered[BLOCK];
    for (int i = 0; i < BLOCK; ++i) gathered[i] = x[order[block * BLOCK + i]];
    quantize_block(gathered, blocks[block], place, call.weight);
  }
}

// The rows of a group of MAX_ROWS; blocks: those of the group.
void quantize_rows(const Call& call, int64_t first_row, Rows* blocks) {
  const int64_t end = std::min(call.num_rows, first_row + MAX_ROWS);
  for (int64_t row = first_row; row < end; ++row) {
    const int place = static_cast<int>(row - first_row);
    switch (call.x_dtype) {
      case F32: quantize_row<float>(call, row, blocks, place); break;
      case BF16: quantize_row<bf16>(call, row, blocks, place); break;
      case F16: quantize_row<f16>(call, row, blocks, place); break;
    }
  }
}

// The first n of V vectors of results, `from` elements behind out.
template <class T>
void store_outputs(void* out, int64_t from, const vf* values, int64_t n) {
  T* target = static_cast<T*>(out) + from;
  for (int v = 0; v < V; ++v) {
    const int64_t left = n - v * W;
    if (left >= W)
      store(target + v * W, values[v]);
    else if (left > 0)
      store_first(target + v * W, values[v], left);
  }
}

void store_totals(void* out, int64_t from, const vd2* totals, int64_t n) {
  double lanes[V * W];
  for (int v = 0; v < V; ++v) {
    store_as(lanes + v * W, totals[v].low);
    store_as(lanes + v * W + W / 2, totals[v].high);
  }
  std::memcpy(static_cast<double*>(out) + from, lanes, std::min<int64_t>(n, V * W) * sizeof *lanes);
}

template <class T>
void load_bias(const void* bias, int64_t from, vf* values, int64_t n) {
  const T* source = static_cast<const T*>(bias) + from;
  for (int v = 0; v < V; ++v) {
    const int64_t left = n - v * W;
    values[v] = left >= W  ? load(source + v * W)
                : left > 0 ? load_first(source + v * W, left)
                           : vf{};
  }
}

// V vectors of outputs, `outputs` vectors behind the first, of the first ROWS rows of a group.
template <int BITS, int64_t KIND, int ROWS>
void multiply_rows(const Call& call, const Rows* x, int64_t first_row, int64_t outputs) {
  constexpr int P = PANEL / W;
  constexpr int STEP_BYTES = PANEL * DEPTH;  // of a step, or of a pair of them
  const QuantizedWeight& weight = call.weight;
  const int64_t panel = outputs / P, lane = outputs % P;
  const int64_t first_output = outputs * W;
  const int64_t n = weight.out_features - first_output;
  const int64_t group_blocks = weight.group_size / BLOCK;
  const int64_t group_bytes = PANEL * size_of(weight.scale_dtype);
  const int64_t offset_bytes =
      KIND == GROUP_ZEROS ? PANEL : PANEL * size_of(weight.offset_dtype);
  const int64_t first_group = panel * (call.num_blocks / group_blocks);
  const auto* codes = static_cast<const uint8_t*>(weight.codes) +
                      panel * call.num_blocks * (PANEL * BLOCK * BITS / 8) + lane * W * DEPTH;
  const auto* scales = static_cast<const uint8_t*>(weight.scales) + first_group * group_bytes;
  const auto* offsets = static_cast<const uint8_t*>(weight.offsets) + first_group * offset_bytes;

  vf bias[V] = {};
  switch (call.bias ? call.bias_dtype : -1) {
    case F32: load_bias<float>(call.bias, first_output, bias, n); break;
    case BF16: load_bias<bf16>(call.bias, first_output, bias, n); break;
    case F16: load_bias<f16>(call.bias, first_output, bias, n); break;
  }
  const bool has_totals = weight.chain_blocks < call.num_blocks || call.out_dtype == F64;
  vd2 totals[ROWS][V];
  if (has_totals)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) totals[r][v] = widen(bias[v]);

  vf acc[ROWS][V] = {};
  int64_t left_of_group = group_blocks;
  for (int64_t block = 0; block < call.num_blocks;) {
    const int64_t end = std::min(block + weight.chain_blocks, call.num_blocks);
    for (; block < end; ++block, ++x) {
      vu w[STEPS][V];
      const uint8_t* block_codes = codes;
#pragma GCC unroll 8
      for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const vu both = load_as<vu>(codes + v * W * DEPTH);
          w[step][v] = BITS == 8 ? both : (step % 2 ? both >> 4 : both) & 0x0f0f0f0fu;
        }
        if (BITS == 8 || step % 2) codes += STEP_BYTES;
      }
      vf scale[V], minimum[V];
      vi zero[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        scale[v] = load_scales(scales, weight.scale_dtype, lane + v);
        if (KIND == GROUP_ZEROS) zero[v] = load_zeros(offsets, lane + v);
        if (KIND == MINIMUMS) minimum[v] = load_scales(offsets, weight.offset_dtype, lane + v);
      }
      const auto* steps = BITS == 8 ? block_codes : reinterpret_cast<const uint8_t*>(w);
      constexpr int64_t APART = BITS == 8 ? STEP_BYTES : V * W * DEPTH;
#pragma GCC unroll 16
      for (int first = 0; first < ROWS; first += TOGETHER) {
        Dot<BITS> dots[TOGETHER][V], uppers[TOGETHER][V];
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; ++i)
          if (first + i < ROWS)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
              dots[i][v].start(KIND == ONE_ZERO ? x->starts[first + i] : 0);
              uppers[i][v].start(0);
            }
#pragma GCC unroll 8
        for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 8
          for (int i = 0; i < TOGETHER; ++i)
            if (first + i < ROWS)
#pragma GCC unroll 2
              for (int v = 0; v < V; ++v) dots[i][v].add(w[step][v], x->codes[step][first + i]);
#pragma GCC unroll 2
        for (int t = 0; t < WIDE; ++t)
#pragma GCC unroll 8
          for (int i = 0; i < TOGETHER; ++i)
            if (first + i < ROWS) {
              const uint8_t* step = steps + x->wide_steps[t][first + i] * APART;
#pragma GCC unroll 2
              for (int v = 0; v < V; ++v)
                uppers[i][v].add(load_as<vu>(step + v * W * DEPTH), x->upper[t][first + i]);
            }
#pragma GCC unroll 8
        for (int i = 0; i < TOGETHER; ++i)
          if (first + i < ROWS)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
              const int r = first + i;
              vi total = dots[i][v].total() + (uppers[i][v].total() << DIGIT);
              if (KIND == GROUP_ZEROS) total -= zero[v] * x->starts[r];
              acc[r][v] = fma(scale[v] * x->scales[r], to_float(total), acc[r][v]);
              if (KIND == MINIMUMS) acc[r][v] = fma(minimum[v], splat(x->sums[r]), acc[r][v]);
            }
      }
      if (--left_of_group == 0) {
        left_of_group = group_blocks;
        scales += group_bytes;
        offsets += offset_bytes;
      }
    }
    if (has_totals)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          totals[r][v] += widen(acc[r][v]);
          acc[r][v] = vf{};
        }
  }

#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const int64_t from = (first_row + r) * call.out_stride + first_output;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = has_totals ? narrow(totals[r][v]) : acc[r][v] + bias[v];
    switch (call.out_dtype) {
      case F64: store_totals(call.out, from, totals[r], n); break;
      case F32: store_outputs<float>(call.out, from, acc[r], n); break;
      case BF16: store_outputs<bf16>(call.out, from, acc[r], n); break;
      case F16: store_outputs<f16>(call.out, from, acc[r], n); break;
    }
  }
}

template <int BITS, int64_t KIND, int ROWS = MAX_ROWS>
void multiply_at_most(int64_t rows, const Call& call, const Rows* x, int64_t first_row,
                      int64_t outputs) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      multiply_rows<BITS, KIND, ROWS>(call, x, first_row, outputs);
    else
      multiply_at_most<BITS, KIND, ROWS - 1>(rows, call, x, first_row, outputs);
  }
}

using Multiply = void (*)(int64_t, const Call&, const Rows*, int64_t, int64_t);

template <int BITS>
Multiply multiply_of(int64_t offset_kind) {
  switch (offset_kind) {
    case ONE_ZERO: return multiply_at_most<BITS, ONE_ZERO>;
    case GROUP_ZEROS: return multiply_at_most<BITS, GROUP_ZEROS>;
    default: return multiply_at_most<BITS, MINIMUMS>;
  }
}

// Of every thread of a team.
void run(const Call& call) {
  const QuantizedWeight& weight = call.weight;
  const Multiply multiply_group =
      weight.bits == 4 ? multiply_of<4>(weight.offset_kind) : multiply_of<8>(weight.offset_kind);
  const int64_t num_blocks = call.num_blocks;
  const int64_t num_groups = (call.num_rows + MAX_ROWS - 1) / MAX_ROWS;
  const int64_t tile_groups =
      std::max<int64_t>(1, TILE_BYTES / (num_blocks * static_cast<int64_t>(sizeof(Rows))));
  const int64_t num_tiles = (num_groups + tile_groups - 1) / tile_groups;
  const int64_t num_outputs = (weight.out_features + V * W - 1) / (V * W);
  static thread_local Scratch scratch;
  Rows* rows;
  if (call.num_rows <= FEW_ROWS) {
    rows = scratch.get<Rows>(num_groups * num_blocks);
    for (int64_t group = 0; group < num_groups; ++group)
      quantize_rows(call, group * MAX_ROWS, rows + group * num_blocks);
  } else {
#pragma omp single copyprivate(rows)
    rows = scratch.get<Rows>(num_groups * num_blocks);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < num_groups; ++group)
      quantize_rows(call, group * MAX_ROWS, rows + group * num_blocks);
  }
#pragma omp for collapse(2) schedule(static)
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t outputs = 0; outputs < num_outputs; ++outputs) {
      const int64_t end = std::min(num_groups, (tile + 1) * tile_groups);
      for (int64_t group = tile * tile_groups; group < end; ++group) {
        const int64_t row = group * MAX_ROWS;
        multiply_group(std::min<int64_t>(MAX_ROWS, call.num_rows - row), call,
                       rows + group * num_blocks, row, outputs * V);
      }
    }
  }
}

}  // namespace

void multiply(const QuantizedWeight& weight, const void* x, int64_t x_stride, int64_t x_dtype,
              const void* bias, int64_t bias_dtype, void* out, int64_t out_stride,
              int64_t out_dtype, int64_t num_rows) {
  run({weight, x, x_stride, x_dtype, bias, bias_dtype, out, out_stride, out_dtype, num_rows,
       weight.in_features / BLOCK});
}

void quantized_linear(const QuantizedWeight& weight, const void* x, int64_t x_stride,
                      int64_t x_dtype, const void* bias, int64_t bias_dtype, void* out,
                      int64_t out_stride, int64_t out_dtype, int64_t num_rows,
                      int64_t num_threads) {
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  multiply(weight, x, x_stride, x_dtype, bias, bias_dtype, out, out_stride, out_dtype, num_rows);
}

}  // namespace stepwire

// See quantized_linear.h.
extern "C" void stepwire_quantized_linear(const stepwire::QuantizedWeight* weight, const void* x,
                                          int64_t x_stride, int64_t x_dtype, const void* bias,
                                          int64_t bias_dtype, void* out, int64_t out_stride,
                                          int64_t out_dtype, int64_t num_rows,
                                          int64_t num_threads) {
  stepwire::quantized_linear(*weight, x, x_stride, x_dtype, bias, bias_dtype, out, out_stride,
                             out_dtype, num_rows, num_threads);
}
