// Vectors of W floats (16 with AVX-512, 8 with AVX2), conversions and elementary functions.
//
// Everything is lane-wise and compiled without contraction, so that an element's bits depend on
// its inputs only and never on its lane or on how many elements are worked on together.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "needs AVX2, FMA and F16C"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define STEPWIRE_AVX512 1
#define STEPWIRE_VECTOR_BYTES 64
#else
#define STEPWIRE_VECTOR_BYTES 32
#endif

namespace stepwire {

constexpr int W = STEPWIRE_VECTOR_BYTES / 4;

typedef float vf __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));
typedef uint64_t vq __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(STEPWIRE_VECTOR_BYTES / 2)));
typedef uint8_t vb __attribute__((vector_size(STEPWIRE_VECTOR_BYTES / 4)));

constexpr float INF = std::numeric_limits<float>::infinity();

// Storage types; the numbers are the codes that callers pass (DTYPE_CODES in library.py).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};
enum DType : int64_t { F32 = 0, BF16 = 1, F16 = 2, E4M3 = 3, F64 = 4 };

inline vf splat(float x) { return x - vf{}; }
inline vu splat(uint32_t x) { return x - vu{}; }

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// a * b + c, rounded once.
inline vf fma(vf a, vf b, vf c) {
#ifdef STEPWIRE_AVX512
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// The larger one; NaN in a is lost, NaN in b is kept.
inline vf max(vf a, vf b) { return a > b ? a : b; }

inline vf round_even(vf x) {
#ifdef STEPWIRE_AVX512
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

inline vi to_int(vf x) {
#ifdef STEPWIRE_AVX512
  return (vi)_mm512_cvtps_epi32((__m512)x);
#else
  return (vi)_mm256_cvtps_epi32((__m256)x);
#endif
}

inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

// W doubles: the lower lanes of a vf, then the upper ones.
typedef double vd __attribute__((vector_size(STEPWIRE_VECTOR_BYTES)));
struct vd2 {
  vd low, high;
};

inline vd2 widen(vf x) {
#ifdef STEPWIRE_AVX512
  return {(vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
          (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1))};
#else
  return {(vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)),
          (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1))};
#endif
}

inline vf narrow(vd2 x) {
#ifdef STEPWIRE_AVX512
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x.low));
  return (vf)_mm512_insertf32x8(low, _mm512_cvtpd_ps((__m512d)x.high), 1);
#else
  const __m256 low = _mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)x.low));
  return (vf)_mm256_insertf128_ps(low, _mm256_cvtpd_ps((__m256d)x.high), 1);
#endif
}

inline void operator+=(vd2& a, vd2 b) {
  a.low += b.low;
  a.high += b.high;
}

// Folds the lanes: halves meet until one lane is left.
template <class Meet>
inline float fold(vf x, Meet meet) {
#ifdef STEPWIRE_AVX512
  const __m256 eight = meet(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
#else
  const __m256 eight = (__m256)x;
#endif
  const auto four = [&](__m128 a, __m128 b) {
    return _mm256_castps256_ps128(meet(_mm256_castps128_ps256(a), _mm256_castps128_ps256(b)));
  };
  __m128 y = four(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  y = four(y, _mm_movehl_ps(y, y));
  y = four(y, _mm_movehdup_ps(y));
  return _mm_cvtss_f32(y);
}

inline float sum(vf x) {
  return fold(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}

// Largest lane; NaN lanes are ignored unless all are.
inline float largest(vf x) {
  return fold(x, [](__m256 a, __m256 b) {
    // The second of the two where one is NaN.
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
  });
}

inline bool any(vi mask) {
#ifdef STEPWIRE_AVX512
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#else
  return _mm256_movemask_ps((__m256)mask) != 0;
#endif
}

// Conversions. Narrowing rounds to nearest even; NaN stays NaN.

inline vf widen(vh x, bf16) { return (vf)(__builtin_convertvector(x, vu) << 16); }

inline vf widen(vh x, f16) {
#ifdef STEPWIRE_AVX512
  return (vf)_mm512_cvtph_ps((__m256i)x);
#else
  return (vf)_mm256_cvtph_ps((__m128i)x);
#endif
}

inline vf widen(vb x, e4m3) {
  // Read as the upper bits of a float16, exponent bias 15 instead of 7, a code is 2^-8 of its
  // value, subnormals included.
  const vh code = __builtin_convertvector(x, vh);
  const vh magnitude = code & 0x7f;
  const vh half = (magnitude << 7) | ((code & 0x80) << 8);
  return widen(magnitude == 0x7f ? half | 0x7e00 : half, f16{}) * 256.0f;
}

inline vh narrow(vf x, bf16) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet, vh);
}

inline vh narrow(vf x, f16) {
#ifdef STEPWIRE_AVX512
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
}

// Magnitudes above 448 saturate.
inline vb narrow(vf x, e4m3) {
  const vu bits = (vu)x;
  const vu sign = (bits >> 24) & 0x80;
  vf magnitude = (vf)(bits & 0x7fffffff);
  magnitude = magnitude > 448.0f ? splat(448.0f) : magnitude;
  const vu m = (vu)magnitude;
  const vu normal = ((m + 0x7ffff + ((m >> 20) & 1)) >> 20) - (120u << 3);
  // 2^14 has a spacing of 2^-9, the smallest subnormal: the addition rounds to it.
  const vu subnormal = (vu)(magnitude + 0x1p14f) & 0xf;
  vu code = magnitude < 0x1p-6f ? subnormal : normal;
  code = x == x ? code : splat(0x7fu);
  return __builtin_convertvector(code | sign, vb);
}

inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The smallest bf16 that is not below x, which must be positive and finite.
inline bf16 round_up(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {static_cast<uint16_t>((bits + 0xffff) >> 16)};
}

inline vf load(const float* p) { return load_as<vf>(p); }
inline vf load(const bf16* p) { return widen(load_as<vh>(p), bf16{}); }
inline vf load(const f16* p) { return widen(load_as<vh>(p), f16{}); }
inline vf load(const e4m3* p) { return widen(load_as<vb>(p), e4m3{}); }

inline void store(float* p, vf x) { store_as(p, x); }
inline void store(bf16* p, vf x) { store_as(p, narrow(x, bf16{})); }
inline void store(f16* p, vf x) { store_as(p, narrow(x, f16{})); }
inline void store(e4m3* p, vf x) { store_as(p, narrow(x, e4m3{})); }

// The first n < W elements, zeros behind them.
template <class T>
inline vf load_first(const T* p, int64_t n) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_first(T* p, vf x, int64_t n) {
  T lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Calls body(offset, load, store) over n elements in vectors; the last one may be partial.
template <class Body>
inline void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + W <= n; i += W)
    body(
        i, [i](const auto* p) { return load(p + i); }, [i](auto* p, vf x) { store(p + i, x); });
  if (i < n)
    body(
        i, [i, n](const auto* p) { return load_first(p + i, n - i); },
        [i, n](auto* p, vf x) { store_first(p + i, x, n - i); });
}

// e^x to 2 ulp; exactly 1 at 0, 0 below the smallest normal number, no infinity above.
// Polynomial of Cephes' expf.
inline vf exp(vf x) {
  const vf low = splat(-87.33654f), high = splat(88.37626f);
  const vf clamped = x < low ? low : (x > high ? high : x);
  const vf n = round_even(clamped * 1.44269504088896341f);
  vf r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const vf y = fma(p, r * r, r) + 1.0f;
  const vf scaled = y * (vf)((to_int(n) + 127) << 23);
  return x < low ? vf{} : scaled;
}

inline float exp(float x) { return exp(splat(x))[0]; }

// log((1 + f) 2^e) for 1 + f in [sqrt(1/2), sqrt(2)), with a relative error of about 1e-7 even
// where the result is near 0. Polynomial of Cephes' logf.
inline vf log_parts(vf f, vf e) {
  const vf square = f * f;
  vf p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  vf y = p * f * square;
  y = fma(e, splat(-2.12194440e-4f), y);
  y = fma(square, splat(-0.5f), y);
  return fma(e, splat(0.693359375f), f + y);
}

// Splits a positive normal x into 1 + f and e as log_parts wants them.
inline void split(vf x, vf& f, vf& e) {
  const vi exponent = ((vi)x - 0x3f3504f3) >> 23;
  f = (vf)((vi)x - (exponent << 23)) - 1.0f;
  e = to_float(exponent);
}

}  // namespace stepwire
