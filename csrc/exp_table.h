#pragma once

#include "simd.h"

/// e^x for x <= 0 from a table, by the rule of kernels/exp_table.py.
namespace pagedkv {

/// entries[i] = e^(-i / steps_per_unit) for i in [0, num_steps]; powers[k] = that of k whole tables, the last one 0.
struct ExpTable {
  const float *entries = nullptr, *powers = nullptr;
  float num_steps = 0, last_power = 0, steps_per_unit = 0;
};

/// e^x below it rounds to 0, where a coarse table would still interpolate.
constexpr float kVanished = -104.0f;

inline Vec exp_by_table(const ExpTable& table, Vec x) {
  const Vec num_steps = broadcast(table.num_steps);
  const Vec steps = mul(x, broadcast(-table.steps_per_unit));
  // min and max give their second operand for NaN: every index lies in the table, whatever x is.
  const Vec ranges = truncated(min(div(steps, num_steps), broadcast(table.last_power)));
  const Vec place = max(min(sub(steps, mul(ranges, num_steps)), num_steps), zero());
  const Vec below = min(truncated(place), broadcast(table.num_steps - 1));
  const Vec low = gather(table.entries, below), high = gather(table.entries + 1, below);
  const Vec result = mul(fma(sub(place, below), sub(high, low), low), gather(table.powers, ranges));
  const Vec whole = where_less(x, broadcast(kVanished), zero(), result);
  return where_less(x, broadcast(1.0f), whole, x);
}

}  // namespace pagedkv
