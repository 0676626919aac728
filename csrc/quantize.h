#pragma once

#include "simd_codes.h"
// After simd.h, which silences a false warning of the intrinsics that both include.
#include "moves.h"

#include <limits>

/// Rows of floats as int8 or float8_e4m3fn with one float32 scale a row, bit for bit as kernels/reference/quantize.py.
namespace pagedkv {

/// Magnitudes are in the order of their bits, NaN above all: infinity or NaN if the row holds one.
inline float largest_magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, float_to_bits(x[i]) & 0x7fffffffu);
  return bits_to_float(largest);
}

template <typename T>
inline float largest_magnitude(const T* x, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint16_t>(x[i].bits & 0x7fffu));
  return to_float(T{largest});
}

struct ToInt8 {
  static constexpr float kLargest = 127.0f;
  static void store(char* p, Vec a, Vec b, Vec c, Vec d) { store_int8(p, a, b, c, d); }
};

struct ToFloat8E4M3 {
  static constexpr float kLargest = 448.0f;
  static void store(char* p, Vec a, Vec b, Vec c, Vec d) { store_float8_e4m3(p, a, b, c, d); }
};

/// The largest magnitude over the largest value of the target, at least 2^-126, or 1 for zeros alone; NaN for a row with
/// infinity or NaN.
template <typename Target, typename T>
inline float scale_of(const T* x, int64_t count) {
  const float largest = largest_magnitude(x, count);
  if (!(largest <= std::numeric_limits<float>::max())) return bits_to_float(0x7fc00000u);
  return largest == 0 ? 1.0f : std::max(largest / Target::kLargest, std::numeric_limits<float>::min());
}

/// Fills out [count] with x / scale, zeros for the scale NaN; no quotient rounds to more than the target's largest value.
template <typename Target, typename T>
inline void divide_row(const T* x, int64_t count, float scale, char* out) {
  if (scale != scale) {
    std::memset(out, 0, static_cast<size_t>(count));
    return;
  }
  constexpr int kStep = 4 * Vec::kLanes;
  const auto step = [divisor = broadcast(scale)](const T* from, char* to) {
    const auto quotient = [&](int i) { return div(load(from + i * Vec::kLanes), divisor); };
    Target::store(to, quotient(0), quotient(1), quotient(2), quotient(3));
  };
  for (; count >= kStep; count -= kStep, x += kStep, out += kStep) step(x, out);
  if (count > 0) {
    T padded[kStep] = {};
    char codes[kStep];
    std::memcpy(padded, x, static_cast<size_t>(count) * sizeof(T));
    step(padded, codes);
    std::memcpy(out, codes, static_cast<size_t>(count));
  }
}

/// Quantises the heads of one token. All scales come first: they overlap, and the divisions need not wait for each.
template <typename Target, typename T>
void quantize_token(TokenRow from, TokenRow to, int64_t heads, int64_t dim, float* scales) {
  const auto row = [&](int64_t head) { return reinterpret_cast<const T*>(from.start + head * from.head_stride); };
  for (int64_t head = 0; head < heads; ++head) scales[head] = scale_of<Target>(row(head), dim);
  for (int64_t head = 0; head < heads; ++head) {
    divide_row<Target>(row(head), dim, scales[head], to.start + head * to.head_stride);
  }
}

/// From [heads, dim] numbers to as many codes and compact scales.
using QuantizeToken = void (*)(TokenRow from, TokenRow to, int64_t heads, int64_t dim, float* scales);

template <typename T>
inline QuantizeToken quantize_token_to(const TensorView& target) {
  return is_dtype(target, kDLInt, 8) ? quantize_token<ToInt8, T> : quantize_token<ToFloat8E4M3, T>;
}

inline QuantizeToken quantize_token_between(const TensorView& source, const TensorView& target) {
  if (is_dtype(source, kDLFloat, 32)) return quantize_token_to<float>(target);
  return is_dtype(source, kDLFloat, 16) ? quantize_token_to<Half>(target) : quantize_token_to<BFloat16>(target);
}

}  // namespace pagedkv
