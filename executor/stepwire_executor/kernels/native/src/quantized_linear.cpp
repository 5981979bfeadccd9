// Linear layers over weights in integers of 4 or 8 bits.
//
// Codes become floats without an error (bf16 holds the integers to 256) and meet the inputs as they
// are. A piece is the inputs of a group, or as many as divide both it and a chain (below). With dot
// the sum over a piece of x[k] * (code[k] - zero), zero being 0 unless the weight has one for all
// codes, an output is the sum of its pieces in order, in float32, each step rounded once:
//   acc = fma(scale, dot, acc)
//   acc = fma(minimum, sum of the piece's x, acc), unless there is one zero for all
// with minimum = -(scale * zero) where groups have zeros. dot is one chain of multiply-adds over
// pairs of inputs, the odd one first, as dpbf16ps adds them. As in linear.cpp, an output is one
// chain of pieces or several of a fixed length, added in float64, whatever the number of rows and
// threads.
//
// Without dpbf16ps, and for x in float32 or f16, everything is in float32, in the same order: the
// same bits, except that dpbf16ps takes and gives zero for what is below 2^-126.
//
// Few rows are multiplied straight from the codes, which is no slower than reading them. For more,
// the codes of a panel of outputs are unpacked once and stay in the second-level cache.

#include "quantized_linear.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"
#include "vec.h"

namespace stepwire {
namespace {

using namespace quantized;

constexpr int P = PANEL / W;  // vectors in a panel
constexpr int V = 2;          // vectors of outputs that are computed together
// Rows that fit in registers: V sums of pieces and V sums of a piece each.
#ifdef STEPWIRE_AVX512
constexpr int DOT_ROWS = 6, WIDE_ROWS = 4;
#else
constexpr int WIDE_ROWS = 2;
#endif
// So many times codes are unpacked where they are multiplied, which takes a fifteenth of a tile's
// time; oftener, once and for all, into memory.
constexpr int64_t DIRECT_TILES = 6;
// So few are laid out by each thread for itself, which takes less than a barrier.
constexpr int64_t FEW_ROWS = 16;
// Of rows that are worked on together: half of a second-level cache of 1 MiB.
constexpr int64_t TILE_BYTES = 512 << 10;
constexpr int SUM_LANES = 16;

// How pairs of inputs and of codes are multiplied.

struct Wide {
  static constexpr int MAX_ROWS = WIDE_ROWS;
  struct Pair {
    float even, odd;
  };
  struct Values {
    vf even, odd;
  };
  template <class T>
  static Pair pair(const T* x) {
    return {to_float32(x[0]), to_float32(x[1])};
  }
  static vf multiply(Values w, Pair x, vf acc) {
    return fma(w.even, splat(x.even), fma(w.odd, splat(x.odd), acc));
  }

  template <int BITS>
  struct Unpack {
    vi zero;
    explicit Unpack(int64_t zero_code) : zero(vi{} + static_cast<int32_t>(zero_code)) {}
    Values operator()(vu words, int step) const {
      const int even = BITS == 4 ? 4 * step : 16 * step;
      const int odd = BITS == 4 ? even + 16 : even + 8;
      return {code(words >> even), code(words >> odd)};
    }
    vf code(vu shifted) const {
      return stepwire::to_float((vi)(shifted & ((1u << BITS) - 1)) - zero);
    }
  };

 private:
  static float to_float32(float x) { return x; }
  static float to_float32(bf16 x) { return widen(x); }
  static float to_float32(f16 x) { return _cvtsh_ss(x.bits); }
};

#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
#define STEPWIRE_DOT 1
struct Dot {
  static constexpr int MAX_ROWS = DOT_ROWS;
  using Pair = uint32_t;
  using Values = vu;
  static Pair pair(const bf16* x) {
    Pair pair;
    std::memcpy(&pair, x, sizeof pair);
    return pair;
  }
  static vf multiply(Values w, Pair x, vf acc) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(x));
  }

  template <int BITS>
  struct Unpack;
};

// Codes of 4 bits are looked up, 32 of them by the low five bits of their lanes: of which the
// uppermost is the next code's, so the table has everything twice.
template <>
struct Dot::Unpack<4> {
  __m512i table;
  explicit Unpack(int64_t zero) {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(i % 16 - zero);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      values[i] = static_cast<uint16_t>(bits >> 16);
    }
    table = _mm512_loadu_si512(values);
  }
  Values operator()(vu words, int step) const {
    return (Values)_mm512_permutexvar_epi16((__m512i)(words >> (4 * step)), table);
  }
};

// Codes of 8 bits become floats in the low bits of 2^23 and of 2^15.
template <>
struct Dot::Unpack<8> {
  vf even_base, odd_base;
  __m512i uppers;  // of each lane: the upper half of the one, then of the other
  explicit Unpack(int64_t zero)
      : even_base(splat(0x1p23f + static_cast<float>(zero))),
        odd_base(splat(0x1p15f + static_cast<float>(zero))) {
    uint16_t lanes[32];
    for (int i = 0; i < 16; ++i) {
      lanes[2 * i] = static_cast<uint16_t>(2 * i + 1);
      lanes[2 * i + 1] = static_cast<uint16_t>(32 + 2 * i + 1);
    }
    uppers = _mm512_loadu_si512(lanes);
  }
  Values operator()(vu words, int step) const {
    const __m512i w = (__m512i)(step ? words >> 16 : words);
    constexpr int AND_OR = 0xea;
    const vf even = (vf)_mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xff),
                                                  _mm512_set1_epi32(0x4b000000), AND_OR);
    const vf odd = (vf)_mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xff00),
                                                 _mm512_set1_epi32(0x47000000), AND_OR);
    return (Values)_mm512_permutex2var_epi16((__m512i)(even - even_base), uppers,
                                             (__m512i)(odd - odd_base));
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

inline vf load_zeros(const void* p, int64_t n) {
  return to_float(
      __builtin_convertvector(load_as<vb>(static_cast<const uint8_t*>(p) + n * W), vi));
}

struct Call {
  const QuantizedWeight& weight;
  const void* x;
  int64_t x_stride, x_dtype;
  const void* bias;
  int64_t bias_dtype;
  void* out;
  int64_t out_stride, out_dtype;
  int64_t num_rows;
  int64_t piece_size;  // inputs; a multiple of 32
  // Rows of a tile, which are multiplied together; the last tile may have fewer.
  int64_t tile_rows, num_tiles;

  int64_t num_pieces() const { return weight.in_features / piece_size; }
  int64_t chain_pieces() const { return weight.chain_blocks * BLOCK / piece_size; }
  int64_t rows_of(int64_t tile) const { return std::min(tile_rows, num_rows - tile * tile_rows); }
};

// Where V vectors of outputs come from: the weight's own words.
template <class Kind, int BITS, bool HAS_MINIMUM>
class Words {
 public:
  using Values = typename Kind::Values;
  static constexpr int STEPS = 16 / BITS;  // of two inputs, in a unit

  Words(const Call& call, int64_t first_vector)
      : lane_(first_vector % P),
        scale_dtype_(call.weight.scale_dtype),
        offset_kind_(call.weight.offset_kind),
        offset_dtype_(call.weight.offset_dtype),
        scale_bytes_(scale_bytes(call.weight)),
        header_bytes_(header_bytes(call.weight)),
        group_bytes_(group_bytes(call.weight)),
        pieces_a_group_(call.weight.group_size / call.piece_size),
        unpack_(call.weight.zero),
        left_(pieces_a_group_) {
    const int64_t num_groups = call.weight.in_features / call.weight.group_size;
    group_ = static_cast<const uint8_t*>(call.weight.data) +
             first_vector / P * num_groups * group_bytes_;
    words_ = group_ + header_bytes_ + lane_ * W * sizeof(uint32_t);
  }

  void load_unit() {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) unit_[v] = load_as<vu>(words_ + v * W * sizeof(uint32_t));
    words_ += PANEL * sizeof(uint32_t);
  }
  Values values(int step, int v) const { return unpack_(unit_[v], step); }
  // Of the piece whose units were loaded.
  void end_piece(vf* scale, vf* minimum) {
    const uint8_t* offsets = group_ + scale_bytes_;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      scale[v] = load_scales(group_, scale_dtype_, lane_ + v);
      if (!HAS_MINIMUM) continue;
      minimum[v] = offset_kind_ == GROUP_ZEROS
                       ? -(scale[v] * load_zeros(offsets, lane_ + v))
                       : load_scales(offsets, offset_dtype_, lane_ + v);
    }
    if (--left_ == 0) {
      left_ = pieces_a_group_;
      group_ += group_bytes_;
      words_ += header_bytes_;
    }
  }

 private:
  const int64_t lane_, scale_dtype_, offset_kind_, offset_dtype_;
  const int64_t scale_bytes_, header_bytes_, group_bytes_, pieces_a_group_;
  const typename Kind::template Unpack<BITS> unpack_;
  const uint8_t *group_, *words_;
  int64_t left_;
  vu unit_[V];
};

// The same, unpacked before.
template <class Kind, bool HAS_MINIMUM>
class Unpacked {
 public:
  using Values = typename Kind::Values;
  static constexpr int STEPS = 4;
  struct Scales {
    vf scale[V], minimum[HAS_MINIMUM ? V : 0];
  };

  Unpacked(const Values* values, const Scales* scales) : values_(values), scales_(scales) {}

  void load_unit() {
    unit_ = values_;
    values_ += STEPS * V;
  }
  Values values(int step, int v) const { return unit_[step * V + v]; }
  void end_piece(vf* scale, vf* minimum) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      scale[v] = scales_->scale[v];
      if (HAS_MINIMUM) minimum[v] = scales_->minimum[v];
    }
    ++scales_;
  }

 private:
  const Values *values_, *unit_ = nullptr;
  const Scales* scales_;
};

template <class Source, class Values, class Scales>
void unpack(const Call& call, Source source, Values* values, Scales* scales) {
  const int64_t units = call.piece_size / (2 * Source::STEPS);
  for (int64_t piece = 0; piece < call.num_pieces(); ++piece, ++scales) {
    for (int64_t unit = 0; unit < units; ++unit) {
      source.load_unit();
#pragma GCC unroll 4
      for (int step = 0; step < Source::STEPS; ++step)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) *values++ = source.values(step, v);
    }
    source.end_piece(scales->scale, scales->minimum);
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

// A tile's rows as they are multiplied.
template <class Kind>
struct Tile {
  const typename Kind::Pair* pairs;  // [in_features / 2][rows]
  const float* sums;                 // [pieces][rows]
  int64_t first_row;
};

// Not inlined, nor copied for each number of rows: this is done once for a whole chain.
[[gnu::noinline]] void load_any_bias(const Call& call, int64_t first_output, vf* bias) {
  const int64_t n = call.weight.out_features - first_output;
  switch (call.bias ? call.bias_dtype : -1) {
    case F32: load_bias<float>(call.bias, first_output, bias, n); break;
    case BF16: load_bias<bf16>(call.bias, first_output, bias, n); break;
    case F16: load_bias<f16>(call.bias, first_output, bias, n); break;
    default: std::fill(bias, bias + V, vf{});
  }
}

// Adds the sums of a chain of rows to those of the chains before.
[[gnu::noinline]] void add_to_totals(const vf* acc, vd2* totals, int64_t rows) {
  for (int64_t i = 0; i < rows * V; ++i) totals[i] += widen(acc[i]);
}

[[gnu::noinline]] void store_row(const Call& call, int64_t row, int64_t first_output,
                                 const vf* values, const vd2* totals) {
  const int64_t n = call.weight.out_features - first_output;
  const int64_t from = row * call.out_stride + first_output;
  switch (call.out_dtype) {
    case F64: store_totals(call.out, from, totals, n); break;
    case F32: store_outputs<float>(call.out, from, values, n); break;
    case BF16: store_outputs<bf16>(call.out, from, values, n); break;
    case F16: store_outputs<f16>(call.out, from, values, n); break;
  }
}

// V vectors of outputs, of ROWS rows.
template <class Kind, bool HAS_MINIMUM, int ROWS, class Source>
[[gnu::noinline]] void multiply_rows(const Call& call, const Tile<Kind>& tile, Source source,
                                     int64_t first_output) {
  const int64_t num_pieces = call.num_pieces(), chain_pieces = call.chain_pieces();
  const int64_t units = call.piece_size / (2 * Source::STEPS);
  const bool has_totals = chain_pieces < num_pieces || call.out_dtype == F64;
  const auto* x = tile.pairs;
  const float* sums = tile.sums;
  vf bias[V], ends[ROWS][V];
  vd2 totals[ROWS][V];
  load_any_bias(call, first_output, bias);
  if (has_totals)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) totals[r][v] = widen(bias[v]);

  for (int64_t piece = 0; piece < num_pieces;) {
    const int64_t end = std::min(piece + chain_pieces, num_pieces);
    vf acc[ROWS][V] = {};
    for (; piece < end; ++piece) {
      vf dot[ROWS][V] = {};
#pragma GCC unroll 1
      for (int64_t unit = 0; unit < units; ++unit) {
        source.load_unit();
#pragma GCC unroll 4
        for (int step = 0; step < Source::STEPS; ++step, x += ROWS) {
          typename Kind::Values w[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) w[v] = source.values(step, v);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) dot[r][v] = Kind::multiply(w[v], x[r], dot[r][v]);
        }
      }
      vf scale[V], minimum[V];
      source.end_piece(scale, minimum);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          acc[r][v] = fma(scale[v], dot[r][v], acc[r][v]);
          if (HAS_MINIMUM) acc[r][v] = fma(minimum[v], splat(sums[r]), acc[r][v]);
        }
      if (HAS_MINIMUM) sums += ROWS;
    }
    std::memcpy(ends, acc, sizeof ends);
    if (has_totals) add_to_totals(ends[0], totals[0], ROWS);
  }

  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < V; ++v)
      ends[r][v] = has_totals ? narrow(totals[r][v]) : ends[r][v] + bias[v];
    store_row(call, tile.first_row + r, first_output, ends[r], totals[r]);
  }
}

template <class Kind, bool HAS_MINIMUM, int ROWS = Kind::MAX_ROWS, class Source>
void multiply_tile(const Call& call, int64_t rows, const Tile<Kind>& tile, const Source& source,
                   int64_t first_output) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      multiply_rows<Kind, HAS_MINIMUM, ROWS>(call, tile, source, first_output);
    else
      multiply_tile<Kind, HAS_MINIMUM, ROWS - 1>(call, rows, tile, source, first_output);
  }
}

// The sum of n values, a multiple of 16: each of 16 lanes in order, then halves that meet.
template <class T>
float sum_of(const T* x, int64_t n) {
  constexpr int N = SUM_LANES / W;
  vf lanes[N];
  for (int i = 0; i < N; ++i) lanes[i] = load(x + i * W);
  for (int64_t k = SUM_LANES; k < n; k += SUM_LANES)
    for (int i = 0; i < N; ++i) lanes[i] += load(x + k + i * W);
  for (int i = 1; i < N; ++i) lanes[0] += lanes[i];
  return sum(lanes[0]);
}

template <class Kind, class T>
void lay_out_row(const Call& call, int64_t row, int64_t place, int64_t rows,
                 typename Kind::Pair* pairs, float* sums) {
  static thread_local Scratch scratch;
  const int64_t size = call.weight.in_features;
  const T* x = static_cast<const T*>(call.x) + row * call.x_stride;
  if (const int64_t* order = call.weight.input_order) {
    T* gathered = scratch.get<T>(size);
    for (int64_t k = 0; k < size; ++k) gathered[k] = x[order[k]];
    x = gathered;
  }
  for (int64_t k = 0; k < size; k += 2) pairs[k / 2 * rows + place] = Kind::pair(x + k);
  if (sums)
    for (int64_t piece = 0; piece < call.num_pieces(); ++piece)
      sums[piece * rows + place] = sum_of(x + piece * call.piece_size, call.piece_size);
}

template <class Kind>
void lay_out_tile(const Call& call, int64_t index, typename Kind::Pair* pairs, float* sums) {
  const int64_t rows = call.rows_of(index);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = index * call.tile_rows + i;
    if constexpr (std::is_same_v<Kind, Wide>) {
      switch (call.x_dtype) {
        case F32: lay_out_row<Kind, float>(call, row, i, rows, pairs, sums); break;
        case BF16: lay_out_row<Kind, bf16>(call, row, i, rows, pairs, sums); break;
        case F16: lay_out_row<Kind, f16>(call, row, i, rows, pairs, sums); break;
      }
    } else {
      lay_out_row<Kind, bf16>(call, row, i, rows, pairs, sums);
    }
  }
}

// Of every thread of a team.
template <class Kind, int BITS, bool HAS_MINIMUM>
void run(const Call& call) {
  using Panel = Unpacked<Kind, HAS_MINIMUM>;
  using Pair = typename Kind::Pair;
  const int64_t row_pairs = call.weight.in_features / 2;
  const int64_t row_sums = HAS_MINIMUM ? call.num_pieces() : 0;
  static thread_local Scratch rows_scratch, panel_scratch;
  Pair* pairs;
  float* sums;
  const auto reserve = [&] {
    const int64_t pair_bytes = (call.num_rows * row_pairs * sizeof(Pair) + 63) / 64 * 64;
    char* bytes = rows_scratch.get<char>(pair_bytes + call.num_rows * row_sums * sizeof(float));
    pairs = reinterpret_cast<Pair*>(bytes);
    sums = reinterpret_cast<float*>(bytes + pair_bytes);
  };
  const auto tile_of = [&](int64_t index) {
    const int64_t row = index * call.tile_rows;
    return Tile<Kind>{pairs + row * row_pairs, sums + row * row_sums, row};
  };
  const auto lay_out = [&](int64_t index) {
    const int64_t row = index * call.tile_rows;
    lay_out_tile<Kind>(call, index, pairs + row * row_pairs,
                       HAS_MINIMUM ? sums + row * row_sums : nullptr);
  };
  if (call.num_rows <= FEW_ROWS) {
    reserve();
    for (int64_t index = 0; index < call.num_tiles; ++index) lay_out(index);
  } else {
#pragma omp single copyprivate(pairs, sums)
    reserve();
#pragma omp for schedule(static)
    for (int64_t index = 0; index < call.num_tiles; ++index) lay_out(index);
  }

  const int64_t num_outputs = (call.weight.out_features + V * W - 1) / (V * W);
  const bool is_direct = call.num_tiles <= DIRECT_TILES;
  const int64_t tile_bytes = call.tile_rows * row_pairs * static_cast<int64_t>(sizeof(Pair));
  const int64_t most_tiles = std::max<int64_t>(DIRECT_TILES, TILE_BYTES / tile_bytes);
  // Of equal size, as threads take equal numbers of them.
  const int64_t num_blocks = (call.num_tiles + most_tiles - 1) / most_tiles;
  const int64_t block_tiles = (call.num_tiles + num_blocks - 1) / num_blocks;
  typename Kind::Values* values = nullptr;
  typename Panel::Scales* scales = nullptr;
  if (!is_direct) {
    const int64_t value_bytes = row_pairs * V * sizeof *values;
    char* bytes = panel_scratch.get<char>(value_bytes + call.num_pieces() * sizeof *scales);
    values = reinterpret_cast<typename Kind::Values*>(bytes);
    scales = reinterpret_cast<typename Panel::Scales*>(bytes + value_bytes);
  }
#pragma omp for collapse(2) schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t outputs = 0; outputs < num_outputs; ++outputs) {
      const Words<Kind, BITS, HAS_MINIMUM> words(call, outputs * V);
      const int64_t end = std::min(call.num_tiles, (block + 1) * block_tiles);
      if (!is_direct) unpack(call, words, values, scales);
      for (int64_t index = block * block_tiles; index < end; ++index) {
        const int64_t rows = call.rows_of(index), first_output = outputs * V * W;
        if (is_direct)
          multiply_tile<Kind, HAS_MINIMUM>(call, rows, tile_of(index), words, first_output);
        else
          multiply_tile<Kind, HAS_MINIMUM>(call, rows, tile_of(index), Panel(values, scales),
                                           first_output);
      }
    }
  }
}

template <class Kind>
void run(Call call) {
  // Rows in equal shares, rather than some tiles full and one with the rest.
  const int64_t fewest = (call.num_rows + Kind::MAX_ROWS - 1) / Kind::MAX_ROWS;
  call.tile_rows = (call.num_rows + fewest - 1) / fewest;
  call.num_tiles = (call.num_rows + call.tile_rows - 1) / call.tile_rows;
  const bool has_minimum = call.weight.offset_kind != ONE_ZERO;
  if (call.weight.bits == 4)
    has_minimum ? run<Kind, 4, true>(call) : run<Kind, 4, false>(call);
  else
    has_minimum ? run<Kind, 8, true>(call) : run<Kind, 8, false>(call);
}

}  // namespace

void multiply(const QuantizedWeight& weight, const void* x, int64_t x_stride, int64_t x_dtype,
              const void* bias, int64_t bias_dtype, void* out, int64_t out_stride,
              int64_t out_dtype, int64_t num_rows) {
  if (num_rows == 0) return;
  const int64_t piece_size = std::gcd(weight.group_size, weight.chain_blocks * BLOCK);
  const Call call{weight, x,          x_stride,  x_dtype,  bias,       bias_dtype,
                  out,    out_stride, out_dtype, num_rows, piece_size, 0, 0};
#ifdef STEPWIRE_DOT
  if (x_dtype == BF16) return run<Dot>(call);
#endif
  run<Wide>(call);
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
