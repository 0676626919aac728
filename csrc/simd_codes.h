#pragma once

#include "simd.h"

/// Floats to codes of one byte, for quantising.
namespace pagedkv {

/// store_int8 and store_float8_e4m3 write 4 * kLanes floats as codes, rounded to nearest even; the floats must be
/// finite and round to no more than the largest value, 127 or 448.
/// int8: adding 1.5 * 2^23 leaves the integer at the end of the mantissa.
/// float8_e4m3fn: for |x| in [2^e, 2^(e+1)), e at least -6, adding 2^(e+20) leaves |x| / 2^(e-3) there, 8 to 16 (0 to 8 where
/// e is -6 for smaller ones); adding 8 for each step of e above -6 makes it the code.
#if defined(__AVX512F__)
inline void store_low_bytes(char* p, __m512i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
inline void store_int8(char* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) store_low_bytes(p + 16 * i, _mm512_cvtps_epi32(all[i].v));
}
inline void store_float8_e4m3(char* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const __m512i bits = _mm512_castps_si512(all[i].v);
    const __m512i exponent = _mm512_and_si512(bits, _mm512_set1_epi32(0x7f800000));
    const __m512i above = _mm512_subs_epu16(exponent, _mm512_set1_epi32(121 << 23));
    const __m512i magic = _mm512_add_epi32(above, _mm512_set1_epi32(141 << 23));
    const __m512i sum = _mm512_castps_si512(_mm512_add_ps(_mm512_abs_ps(all[i].v), _mm512_castsi512_ps(magic)));
    const __m512i code = _mm512_add_epi32(_mm512_sub_epi32(sum, magic), _mm512_srli_epi32(above, 20));
    // The bit 0x80 of the shifted sign, the others of the code.
    store_low_bytes(p + 16 * i,
                    _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x80), _mm512_srli_epi32(bits, 24), code, 0xca));
  }
}
#elif defined(__AVX2__)
/// The lanes in order, saturated to the bytes of signed 8-bit integers.
inline __m256i saturated_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline void store_int8(char* p, Vec a, Vec b, Vec c, Vec d) {
  const __m256i bytes = saturated_bytes(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v), _mm256_cvtps_epi32(c.v),
                                        _mm256_cvtps_epi32(d.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
}
inline __m256i float8_e4m3_magnitude(Vec x) {
  const __m256i exponent = _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7f800000));
  const __m256i above = _mm256_subs_epu16(exponent, _mm256_set1_epi32(121 << 23));
  const __m256i magic = _mm256_add_epi32(above, _mm256_set1_epi32(141 << 23));
  const __m256i sum = _mm256_castps_si256(_mm256_add_ps(magnitude(x).v, _mm256_castsi256_ps(magic)));
  return _mm256_add_epi32(_mm256_sub_epi32(sum, magic), _mm256_srli_epi32(above, 20));
}
inline void store_float8_e4m3(char* p, Vec a, Vec b, Vec c, Vec d) {
  const __m256i signs = saturated_bytes(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v), _mm256_castps_si256(c.v),
                                        _mm256_castps_si256(d.v));
  const __m256i codes = saturated_bytes(float8_e4m3_magnitude(a), float8_e4m3_magnitude(b), float8_e4m3_magnitude(c),
                                        float8_e4m3_magnitude(d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_or_si256(codes, _mm256_and_si256(signs, _mm256_set1_epi8(static_cast<char>(0x80)))));
}
#else
inline void store_int8(char* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const Vec sum = add(all[i], broadcast(12582912.0f));
    for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<char>(float_to_bits(sum.v[j]));
  }
}
inline void store_float8_e4m3(char* p, Vec a, Vec b, Vec c, Vec d) {
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    const Int4 bits = (Int4)all[i].v;
    const Int4 above = (Int4)max(magnitude(all[i]), broadcast(0.015625f)).v & 0x7f800000;
    const Int4 magic = above + (20 << 23);
    const Int4 sum = (Int4)add(magnitude(all[i]), {(Float4)magic}).v;
    const Int4 codes = (sum - magic + ((above - (121 << 23)) >> 20)) | ((bits >> 24) & 0x80);
    for (int j = 0; j < 4; ++j) p[4 * i + j] = static_cast<char>(codes[j]);
  }
}
#endif

}  // namespace pagedkv
