// Row-wise operations: normalisation and gated activation.

#include "row_operations.h"

namespace stepwire {
namespace {

template <class T, class Weight>
void normalise(const NormCall& call) {
  const int64_t num_rows = call.num_outer * call.num_inner;
#pragma omp for schedule(static)
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
void gate(const void* x, int64_t stride, void* out, int64_t num_rows, int64_t size) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < num_rows; ++row) {
    const T* gate = static_cast<const T*>(x) + row * stride;
    const T* up = gate + size;
    T* to = static_cast<T*>(out) + row * size;
    for_vectors(size, [&](int64_t, auto get, auto put) {
      const vf g = get(gate);
      put(to, g / (exp(-g) + 1.0f) * get(up));
    });
  }
}

template <class T>
void dispatch_weight(const NormCall& call) {
  if (call.weight_dtype == F32)
    normalise<T, float>(call);
  else
    normalise<T, T>(call);
}

}  // namespace

void rms_norm(const NormCall& call) {
  switch (call.dtype) {
    case F32: return dispatch_weight<float>(call);
    case BF16: return dispatch_weight<bf16>(call);
    case F16: return dispatch_weight<f16>(call);
  }
}

void silu_and_mul(const void* x, int64_t stride, int64_t dtype, void* out, int64_t num_rows,
                  int64_t size) {
  switch (dtype) {
    case F32: return gate<float>(x, stride, out, num_rows, size);
    case BF16: return gate<bf16>(x, stride, out, num_rows, size);
    case F16: return gate<f16>(x, stride, out, num_rows, size);
  }
}

}  // namespace stepwire

extern "C" void stepwire_rms_norm(const void* x, int64_t outer_stride, int64_t inner_stride,
                                  int64_t dtype, const void* weight, int64_t weight_dtype,
                                  void* residual, void* out, float eps, int64_t num_outer,
                                  int64_t num_inner, int64_t size, int64_t num_threads) {
  using namespace stepwire;
  const NormCall call{x,        outer_stride, inner_stride, dtype,     weight,    weight_dtype,
                      residual, out,          eps,          num_outer, num_inner, size};
#pragma omp parallel num_threads(threads_for(num_outer * num_inner * size, num_threads))
  rms_norm(call);
}

extern "C" void stepwire_silu_and_mul(const void* x, int64_t stride, int64_t dtype, void* out,
                                      int64_t num_rows, int64_t size, int64_t num_threads) {
  using namespace stepwire;
#pragma omp parallel num_threads(threads_for(num_rows * size, num_threads))
  silu_and_mul(x, stride, dtype, out, num_rows, size);
}
