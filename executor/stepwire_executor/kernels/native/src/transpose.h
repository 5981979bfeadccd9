// W x W transposition in registers.
#pragma once

#include "vec.h"

namespace stepwire {

#ifdef STEPWIRE_AVX512

// Swaps the off-diagonal blocks of DISTANCE lanes in each pair of rows that far apart.
template <int DISTANCE>
inline void exchange(vf rows[W]) {
  vi low, high;
  for (int lane = 0; lane < W; ++lane) {
    const bool is_moved = lane & DISTANCE;
    low[lane] = is_moved ? W + lane - DISTANCE : lane;
    high[lane] = is_moved ? W + lane : lane + DISTANCE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & DISTANCE) continue;
    const __m512 a = (__m512)rows[i], b = (__m512)rows[i + DISTANCE];
    rows[i] = (vf)_mm512_permutex2var_ps(a, (__m512i)low, b);
    rows[i + DISTANCE] = (vf)_mm512_permutex2var_ps(a, (__m512i)high, b);
  }
}

inline void transpose(vf rows[W]) {
  exchange<1>(rows);
  exchange<2>(rows);
  exchange<4>(rows);
  exchange<8>(rows);
}

#else

inline void transpose(vf rows[W]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

#endif

}  // namespace stepwire
