// Linear layers over weights packed in panels of 32 outputs.
//
// An output is one chain of multiply-adds over k = 0, 1, 2, ..., or several of a fixed length whose
// sums are added in float64, whatever the number of rows and threads: rows are blocked and panels
// are shared out, k is not. That makes a row's bits independent of its neighbours, and costs
// nothing: panels are read once, front to back.
//
// Ranks that share k each compute some of the chains. float64 adds up float32 sums without an
// error unless they lie some 2^26 apart, so the order does not show once the total is rounded.

#include "linear.h"

#include <algorithm>

#include "vec.h"

namespace stepwire {
namespace {

constexpr int PANEL = 32;
constexpr int P = PANEL / W;  // vectors in a panel
// Rows that fit in registers: rows * P accumulators, weights and a broadcast beside them.
#ifdef STEPWIRE_AVX512
constexpr int MAX_ROWS = 8;
#else
constexpr int MAX_ROWS = 3;
#endif
constexpr int64_t ROWS_A_TASK = 16 * MAX_ROWS;

// How one kind of weight is multiplied. A step covers `DEPTH` values of k:
// panel element [step][output][DEPTH].

struct Float32 {
  using X = float;
  using Weight = float;
  static constexpr int DEPTH = 1;
  struct Values {
    vf even;
  };
  static Values weights(const Weight* w) { return {load(w)}; }
  static vf multiply(Values w, const X* x, vf acc) { return fma(w.even, splat(x[0]), acc); }
};

struct Float16 : Float32 {
  using Weight = f16;
  static Values weights(const Weight* w) { return {load(w)}; }
};

// bf16 weights, rows widened to float32 beforehand.
struct Bfloat16Wide {
  using X = float;
  using Weight = bf16;
  static constexpr int DEPTH = 2;
  struct Values {
    vf even, odd;
  };
  static Values weights(const Weight* w) {
    const vu pairs = load_as<vu>(w);
    return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)};
  }
  static vf multiply(Values w, const X* x, vf acc) {
    return fma(w.odd, splat(x[1]), fma(w.even, splat(x[0]), acc));
  }
};

#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
struct Bfloat16Dot {
  using X = bf16;
  using Weight = bf16;
  static constexpr int DEPTH = 2;
  struct Values {
    vu pairs;
  };
  static Values weights(const Weight* w) { return {load_as<vu>(w)}; }
  static vf multiply(Values w, const X* x, vf acc) {
    uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w.pairs, (__m512bh)splat(pair));
  }
};
#endif

struct Call {
  const void* x;
  int64_t x_stride;
  const void* weight;
  const void* bias;
  int64_t bias_dtype;
  void* out;
  int64_t out_stride, out_dtype;
  int64_t num_rows, num_steps, num_outputs;
  int64_t chain_steps;
};

template <class T>
void store_panel(T* out, const vf* acc, int64_t n) {
  for (int p = 0; p < P; ++p) {
    const int64_t left = n - p * W;
    if (left >= W)
      store(out + p * W, acc[p]);
    else if (left > 0)
      store_first(out + p * W, acc[p], left);
  }
}

void store_panel(double* out, const vd2* totals, int64_t n) {
  double lanes[PANEL];
  for (int p = 0; p < P; ++p) {
    store_as(lanes + p * W, totals[p].low);
    store_as(lanes + p * W + W / 2, totals[p].high);
  }
  std::memcpy(out, lanes, n * sizeof(double));
}

template <class T>
void load_bias(const T* bias, vf* out, int64_t n) {
  for (int p = 0; p < P; ++p) {
    const int64_t left = n - p * W;
    out[p] = left >= W ? load(bias + p * W) : left > 0 ? load_first(bias + p * W, left) : vf{};
  }
}

template <class Kind, int ROWS>
void multiply_rows(const Call& call, const typename Kind::Weight* panel, int64_t row,
                   int64_t first_output, const vf* bias) {
  const auto* x = static_cast<const typename Kind::X*>(call.x) + row * call.x_stride;
  const bool has_totals = call.chain_steps < call.num_steps || call.out_dtype == F64;
  vd2 totals[ROWS][P];
  if (has_totals)
    for (int r = 0; r < ROWS; ++r)
      for (int p = 0; p < P; ++p) totals[r][p] = bias ? widen(bias[p]) : vd2{};
  vf acc[ROWS][P] = {};
  for (int64_t step = 0; step < call.num_steps;) {
    const int64_t end = std::min(step + call.chain_steps, call.num_steps);
    for (; step < end; ++step) {
      typename Kind::Values w[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) w[p] = Kind::weights(panel + p * W * Kind::DEPTH);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p)
          acc[r][p] = Kind::multiply(w[p], x + r * call.x_stride, acc[r][p]);
      x += Kind::DEPTH;
      panel += PANEL * Kind::DEPTH;
    }
    if (has_totals)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          totals[r][p] += widen(acc[r][p]);
          acc[r][p] = vf{};
        }
  }
  const int64_t n = std::min<int64_t>(PANEL, call.num_outputs - first_output);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t offset = (row + r) * call.out_stride + first_output;
    if (call.out_dtype == F64) {
      store_panel(static_cast<double*>(call.out) + offset, totals[r], n);
      continue;
    }
    for (int p = 0; p < P; ++p) {
      if (has_totals)
        acc[r][p] = narrow(totals[r][p]);
      else if (bias)
        acc[r][p] += bias[p];
    }
    switch (call.out_dtype) {
      case F32: store_panel(static_cast<float*>(call.out) + offset, acc[r], n); break;
      case BF16: store_panel(static_cast<bf16*>(call.out) + offset, acc[r], n); break;
      case F16: store_panel(static_cast<f16*>(call.out) + offset, acc[r], n); break;
    }
  }
}

template <class Kind, int ROWS = MAX_ROWS>
void multiply_at_most(int64_t rows, const Call& call, const typename Kind::Weight* panel,
                      int64_t row, int64_t first_output, const vf* bias) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      multiply_rows<Kind, ROWS>(call, panel, row, first_output, bias);
    else
      multiply_at_most<Kind, ROWS - 1>(rows, call, panel, row, first_output, bias);
  }
}

template <class Kind>
void run(const Call& call) {
  const int64_t num_panels = (call.num_outputs + PANEL - 1) / PANEL;
  const int64_t num_tasks = (call.num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK;
#pragma omp for collapse(2) schedule(static)
  for (int64_t index = 0; index < num_panels; ++index) {
    for (int64_t task = 0; task < num_tasks; ++task) {
      const auto* panel = static_cast<const typename Kind::Weight*>(call.weight) +
                          index * call.num_steps * PANEL * Kind::DEPTH;
      const int64_t first = index * PANEL;
      const int64_t n = std::min<int64_t>(PANEL, call.num_outputs - first);
      vf bias[P];
      switch (call.bias ? call.bias_dtype : -1) {
        case F32: load_bias(static_cast<const float*>(call.bias) + first, bias, n); break;
        case BF16: load_bias(static_cast<const bf16*>(call.bias) + first, bias, n); break;
        case F16: load_bias(static_cast<const f16*>(call.bias) + first, bias, n); break;
      }
      const int64_t end = std::min(call.num_rows, (task + 1) * ROWS_A_TASK);
      for (int64_t row = task * ROWS_A_TASK; row < end; row += MAX_ROWS)
        multiply_at_most<Kind>(std::min<int64_t>(MAX_ROWS, end - row), call, panel, row, first,
                               call.bias ? bias : nullptr);
    }
  }
}

}  // namespace

bool linear_takes_bf16() {
#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
  return true;
#else
  return false;
#endif
}

void multiply(const DenseWeight& weight, const void* x, int64_t x_stride, const void* bias,
              int64_t bias_dtype, void* out, int64_t out_stride, int64_t out_dtype,
              int64_t num_rows) {
  const Call call{x,         x_stride, weight.values,    bias,                bias_dtype,        out, out_stride,
                  out_dtype, num_rows, weight.num_steps, weight.out_features, weight.chain_steps};
  switch (weight.dtype) {
    case F32: run<Float32>(call); break;
    case F16: run<Float16>(call); break;
#if defined(STEPWIRE_AVX512) && defined(__AVX512BF16__)
    case BF16: run<Bfloat16Dot>(call); break;
#else
    case BF16: run<Bfloat16Wide>(call); break;
#endif
  }
}

}  // namespace stepwire

extern "C" int64_t stepwire_linear_takes_bf16() { return stepwire::linear_takes_bf16(); }

// As multiply, with a team of num_threads; out is contiguous, float64 too.
extern "C" void stepwire_linear(const void* x, int64_t x_stride, const void* values,
                                int64_t weight_dtype, const void* bias, int64_t bias_dtype,
                                void* out, int64_t out_dtype, int64_t num_rows, int64_t num_steps,
                                int64_t num_outputs, int64_t chain_steps, int64_t num_threads) {
  const stepwire::DenseWeight weight{values, weight_dtype, num_steps, num_outputs, chain_steps};
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  stepwire::multiply(weight, x, x_stride, bias, bias_dtype, out, num_outputs, out_dtype, num_rows);
}
