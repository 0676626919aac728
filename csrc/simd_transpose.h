#pragma once

#include "simd.h"

/// Squares of `Vec::kLanes` x `Vec::kLanes` floats, turned over in registers.
namespace pagedkv {

#if defined(__AVX512F__)

inline void transpose(Vec (&rows)[16]) {
  __m512 pairs[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m512 quads[16];  // the n-th of four: column 4 k + n of rows i to i + 3 in quarter k
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int n = 0; n < 4; ++n) {
    const __m512 even_low = _mm512_shuffle_f32x4(quads[n], quads[4 + n], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(quads[n], quads[4 + n], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(quads[8 + n], quads[12 + n], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(quads[8 + n], quads[12 + n], 0xdd);
    rows[n] = {_mm512_shuffle_f32x4(even_low, even_high, 0x88)};
    rows[4 + n] = {_mm512_shuffle_f32x4(odd_low, odd_high, 0x88)};
    rows[8 + n] = {_mm512_shuffle_f32x4(even_low, even_high, 0xdd)};
    rows[12 + n] = {_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd)};
  }
}

#elif defined(__AVX2__)

inline void transpose(Vec (&rows)[8]) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  __m256 quads[8];  // the n-th of four: column n of rows i to i + 3 in the lower half, column 4 + n in the upper
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int n = 0; n < 4; ++n) {
    rows[n] = {_mm256_permute2f128_ps(quads[n], quads[4 + n], 0x20)};
    rows[4 + n] = {_mm256_permute2f128_ps(quads[n], quads[4 + n], 0x31)};
  }
}

#else

inline void transpose(Vec (&rows)[4]) {
  const Float4 a = rows[0].v, b = rows[1].v, c = rows[2].v, d = rows[3].v;
  for (int i = 0; i < 4; ++i) rows[i] = {Float4{a[i], b[i], c[i], d[i]}};
}

#endif

/// Adding lanes two by two in this order, then the sums two by two and so on, is what `reduce4` does.
constexpr int sum_order(int n) {
#if defined(__AVX512F__)
  return (n & 1) << 3 | (n & 2) << 1 | n >> 2;
#else
  return n;
#endif
}

}  // namespace pagedkv
