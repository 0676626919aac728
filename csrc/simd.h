#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header initialises undefined vectors with themselves and then warns of it (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/// One vector type, `Vec`, of 16, 8 or 4 floats. Nothing outside this header and simd_codes.h knows an instruction set.
/// Every sum over lanes runs in one fixed order per instruction set, so equal operands give equal bits everywhere.
namespace pagedkv {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

/// What one unit of a loaded number stands for: the exponent of an e4m3 moved into a float16 is 8 too low, and a factor at the
/// end of a sum costs less than one at each element.
template <typename T>
constexpr float kUnit = 1.0f;
template <>
constexpr float kUnit<Float8E4M3> = 256.0f;

/// The same number in units, or as it is, as float16 bits. A NaN stays one.
inline Half to_half_bits(Float8E4M3 x) {
  const uint32_t rest = x.bits & 0x7fu;
  return {static_cast<uint16_t>((x.bits & 0x80u) << 8 | rest << 7 | (rest == 0x7fu ? 0x7e00u : 0u))};
}
inline Half to_half_bits(Float8E5M2 x) { return {static_cast<uint16_t>(x.bits << 8)}; }

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

/// Rounds to nearest even; a NaN stays one.
inline BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline __m256i widen_float8(const Float8E5M2*, __m128i bytes) { return _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8); }
inline __m256i widen_float8(const Float8E4M3*, __m128i bytes) {
  const __m256i x = _mm256_cvtepu8_epi16(bytes), low = _mm256_set1_epi16(0x7f), rest = _mm256_and_si256(x, low);
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(rest, low), _mm256_set1_epi16(0x7e00));
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(low, x), 8);
  return _mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(rest, 7));
}
inline Vec load(const Float8E4M3* p) {
  return {_mm512_cvtph_ps(widen_float8(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const Float8E5M2* p) {
  return {_mm512_cvtph_ps(widen_float8(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
/// The lower 8 lanes from memory, the upper 8 zero: the end of a row whose length is an odd multiple of 8.
inline Vec load_lower(const float* p) { return {_mm512_zextps256_ps512(_mm256_loadu_ps(p))}; }
inline Vec load_lower(const Half* p) {
  return {_mm512_zextps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load_lower(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_zextps256_ps512(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)))};
}
inline Vec load_lower(const int8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_zextps256_ps512(_mm256_cvtepi32_ps(wide))};
}
inline Vec load_lower(const Float8E4M3* p) {
  return {_mm512_cvtph_ps(widen_float8(p, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load_lower(const Float8E5M2* p) {
  return {_mm512_cvtph_ps(widen_float8(p, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
/// The larger one; b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec magnitude(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {
  return {_mm512_or_ps(_mm512_abs_ps(a.v), _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
/// Per lane: a < b ? x : y.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
/// Lanes [first, last) of x, y elsewhere.
inline Vec where_lanes(int first, int last, Vec x, Vec y) {
  const uint32_t below_last = last >= 16 ? 0xffffu : (last <= 0 ? 0u : (1u << last) - 1);
  const uint32_t below_first = first >= 16 ? 0xffffu : (first <= 0 ? 0u : (1u << first) - 1);
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_last & ~below_first), y.v, x.v)};
}
/// Rounded toward 0; lanes are not negative and below 2^31.
inline Vec truncated(Vec a) { return {_mm512_cvtepi32_ps(_mm512_cvttps_epi32(a.v))}; }
/// table[index], the index being the lane rounded toward 0.
inline Vec gather(const float* table, Vec index) { return {_mm512_i32gather_ps(_mm512_cvttps_epi32(index.v), table, 4)}; }
/// 2^n for t = 1.5 * 2^23 + n.
inline Vec power_of_two(Vec t) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23), _mm512_set1_epi32(127 << 23)))};
}
/// out[i] = sum of the lanes of the i-th argument.
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0x4e));
  const __m512i picks = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(picks, one)));
}
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec load(const Float8E5M2* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtph_ps(_mm_unpacklo_epi8(_mm_setzero_si128(), bytes))};
}
inline Vec load(const Float8E4M3* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i low = _mm_set1_epi16(0x7f), rest = _mm_and_si128(x, low);
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(rest, low), _mm_set1_epi16(0x7e00));
  const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(low, x), 8);
  return {_mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(rest, 7)))};
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
/// The larger one; b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec magnitude(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign_of(Vec a, Vec sign) {
  return {_mm256_or_ps(magnitude(a).v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
/// Per lane: a < b ? x : y.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
/// Lanes [first, last) of x, y elsewhere.
inline Vec where_lanes(int first, int last, Vec x, Vec y) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i too_low = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
  const __m256i low_enough = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  return {_mm256_blendv_ps(y.v, x.v, _mm256_castsi256_ps(_mm256_andnot_si256(too_low, low_enough)))};
}
/// Rounded toward 0; lanes are not negative and below 2^31.
inline Vec truncated(Vec a) { return {_mm256_cvtepi32_ps(_mm256_cvttps_epi32(a.v))}; }
/// table[index], the index being the lane rounded toward 0.
inline Vec gather(const float* table, Vec index) { return {_mm256_i32gather_ps(table, _mm256_cvttps_epi32(index.v), 4)}; }
/// 2^n for t = 1.5 * 2^23 + n.
inline Vec power_of_two(Vec t) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23), _mm256_set1_epi32(127 << 23)))};
}
/// out[i] = sum of the lanes of the i-th argument.
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
inline float reduce_max(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}

#else

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
};

inline float to_float(Half value) {
  // Shifting the exponent into place and multiplying by 2^112 also gives subnormals their value.
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | 0x7f800000u | (rest & 0x007fffffu));
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000u)));
}

inline Vec zero() { return {Float4{0, 0, 0, 0}}; }
inline Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, 16);
  return x;
}
inline Vec load(const Half* p) {
#if defined(__ARM_NEON)
  return {(Float4)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)))};
#else
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
#endif
}
inline Vec load(const BFloat16* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
inline Vec load(const int8_t* p) {
  return {Float4{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
}
template <typename Float8>
inline Vec load_float8(const Float8* p) {
  const Half wide[4] = {to_half_bits(p[0]), to_half_bits(p[1]), to_half_bits(p[2]), to_half_bits(p[3])};
  return load(wide);
}
inline Vec load(const Float8E4M3* p) { return load_float8(p); }
inline Vec load(const Float8E5M2* p) { return load_float8(p); }
inline void store(float* p, Vec x) { std::memcpy(p, &x.v, 16); }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__ARM_NEON)
  return {(Float4)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
inline Vec where(Int4 condition, Vec x, Vec y) {
  return {(Float4)(((Int4)x.v & condition) | ((Int4)y.v & ~condition))};
}
/// The larger one; b where either is NaN.
inline Vec max(Vec a, Vec b) { return where(a.v > b.v, a, b); }
inline Vec min(Vec a, Vec b) { return where(a.v < b.v, a, b); }
inline Vec magnitude(Vec a) {
  const Int4 mask = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Float4)((Int4)a.v & mask)};
}
inline Vec with_sign_of(Vec a, Vec sign) {
  const Int4 mask = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return {(Float4)(((Int4)a.v & mask) | ((Int4)sign.v & ~mask))};
}
/// Per lane: a < b ? x : y.
inline Vec where_less(Vec a, Vec b, Vec x, Vec y) { return where(a.v < b.v, x, y); }
/// Lanes [first, last) of x, y elsewhere.
inline Vec where_lanes(int first, int last, Vec x, Vec y) {
  const Int4 lane = {0, 1, 2, 3};
  return where((lane >= first) & (lane < last), x, y);
}
/// Rounded toward 0; lanes are not negative and below 2^31.
inline Vec truncated(Vec a) { return {__builtin_convertvector(__builtin_convertvector(a.v, Int4), Float4)}; }
/// table[index], the index being the lane rounded toward 0.
inline Vec gather(const float* table, Vec index) {
  const Int4 at = __builtin_convertvector(index.v, Int4);
  return {Float4{table[at[0]], table[at[1]], table[at[2]], table[at[3]]}};
}
/// 2^n for t = 1.5 * 2^23 + n.
inline Vec power_of_two(Vec t) {
  const Int4 bias = {127 << 23, 127 << 23, 127 << 23, 127 << 23};
  return {(Float4)(((Int4)t.v << 23) + bias)};
}
/// out[i] = sum of the lanes of the i-th argument.
inline void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) out[i] = (all[i].v[0] + all[i].v[1]) + (all[i].v[2] + all[i].v[3]);
}
inline float reduce_max(Vec a) {
  const float low = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
  const float high = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return low > high ? low : high;
}

#endif

#if !defined(__AVX512F__)
/// Rows are multiples of 8 long, so narrower vectors never end inside one.
template <typename T>
inline Vec load_lower(const T* p) {
  return load(p);
}
#endif

#if defined(__AVX2__)
inline float to_float(Half value) { return _cvtsh_ss(value.bits); }
inline Half to_half(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }
#else
/// Rounds to nearest even; a NaN stays one.
inline Half to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (rest >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {
    // Adding 0.5 leaves the subnormal's bits, rounded by the adder, at the end of the mantissa.
    const uint32_t rounded = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}
#endif

inline float reduce_add(Vec a) {
  float sums[4];
  reduce4(a, a, a, a, sums);
  return sums[0];
}

inline void store_as(float* p, float value) { *p = value; }
inline void store_as(Half* p, float value) { *p = to_half(value); }
inline void store_as(BFloat16* p, float value) { *p = to_bfloat16(value); }

#if defined(__AVX2__)
/// Eight floats, rounded to nearest even.
inline void store8_as(float* p, const float* x) { _mm256_storeu_ps(p, _mm256_loadu_ps(x)); }
inline void store8_as(Half* p, const float* x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT));
}
inline void store8_as(BFloat16* p, const float* x) {
  const __m256 value = _mm256_loadu_ps(x);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
#else
template <typename T>
inline void store8_as(T* p, const float* x) {
  for (int i = 0; i < 8; ++i) store_as(p + i, x[i]);
}
#endif

/// Into the second-level cache: what is fetched this far ahead would fall out of the first again, and its few miss buffers
/// would bound the bandwidth.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

/// e^x to about 1 ulp for x <= 88; 0 below -87.3, so also for -inf; NaN for NaN.
inline Vec exp(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  const Vec clamped = max(broadcast(-87.3f), x);
  const Vec t = fma(clamped, broadcast(1.44269504f), magic);
  const Vec n = sub(t, magic);
  Vec r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
  return where_less(x, broadcast(-87.3f), zero(), mul(p, power_of_two(t)));
}

inline float exp_of(float x) {
  float lanes[Vec::kLanes];
  store(lanes, exp(broadcast(x)));
  return lanes[0];
}

/// tanh x to about 2 ulp: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Vec tanh(Vec x) {
  const Vec a = magnitude(x);
  const Vec z = mul(x, x);
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const Vec near_zero = fma(mul(p, z), x, x);
  const Vec e = exp(min(broadcast(20.0f), add(a, a)));
  const Vec far = sub(broadcast(1.0f), div(broadcast(2.0f), add(e, broadcast(1.0f))));
  return where_less(a, broadcast(0.625f), near_zero, with_sign_of(far, x));
}

}  // namespace pagedkv
