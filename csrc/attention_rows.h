#pragma once

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

/// What happens to one query row between the two inner products: softmax of a chunk, and folding chunks together.
namespace pagedkv {

constexpr float kNoKey = -std::numeric_limits<float>::infinity();

/// How raw dot products become logits.
struct LogitRule {
  float scale, soft_cap;
};

/// What is particular to one row in one chunk: tokens [first, last) of the chunk are visible, less those that `mask` has 0 for.
struct RowView {
  int first, last;
  const uint8_t* mask;  // by token of the chunk, or null
  float alibi_slope;
  float alibi_start;  // distance of the chunk's token 0 from the row
};

/// Largest logit and sum of exponentials of one row over one chunk, or over all chunks so far; sum 0: no key seen.
struct RowState {
  float highest = kNoKey, sum = 0;
};

/// Turns the dot products of a chunk into weights exp(logit - highest), in place; tokens not visible get no defined weight.
/// The sum adds lane by lane in steps from token 0 of the chunk, so it does not depend on which tokens were computed beside.
inline RowState softmax_chunk(float* scores, const LogitRule& rule, const RowView& row) {
  constexpr int W = Vec::kLanes;
  if (row.first >= row.last) return {};
  const int first = row.first & ~(W - 1);
  const Vec scale = broadcast(rule.scale), none = broadcast(kNoKey);
  Vec top = none;
  float iota[W];
  for (int i = 0; i < W; ++i) iota[i] = static_cast<float>(i);
  for (int t = first; t < row.last; t += W) {
    Vec x = mul(load(scores + t), scale);
    if (rule.soft_cap > 0) x = mul(broadcast(rule.soft_cap), tanh(div(x, broadcast(rule.soft_cap))));
    if (row.alibi_slope != 0) {
      const Vec distance = add(load(iota), broadcast(row.alibi_start + static_cast<float>(t)));
      x = add(x, mul(broadcast(row.alibi_slope), distance));
    }
    if (t < row.first || t + W > row.last) x = where_lanes(row.first - t, row.last - t, x, none);
    store(scores + t, x);
    if (row.mask) {
      for (int i = std::max(t, row.first); i < std::min(t + W, row.last); ++i)
        if (!row.mask[i]) scores[i] = kNoKey;
      x = load(scores + t);
    }
    top = max(x, top);
  }
  const float highest = reduce_max(top);
  const Vec base = broadcast(highest == kNoKey ? 0.0f : highest);
  Vec sum = zero();
  for (int t = first; t < row.last; t += W) {
    const Vec weight = exp(sub(load(scores + t), base));
    store(scores + t, weight);
    sum = add(sum, weight);
  }
  return {highest, reduce_add(sum)};
}

/// Folds the state of the next chunk into the running one. The only place where chunks meet.
inline void fold_chunk(RowState& state, float* total, const RowState& chunk, const float* chunk_total, int64_t padded_dim) {
  if (chunk.sum == 0) return;
  constexpr int W = Vec::kLanes;
  if (state.sum == 0) {
    state = chunk;
    std::copy(chunk_total, chunk_total + padded_dim, total);
    return;
  }
  const float highest = std::max(state.highest, chunk.highest);
  const float old_weight = exp_of(state.highest - highest), new_weight = exp_of(chunk.highest - highest);
  state.sum = state.sum * old_weight + chunk.sum * new_weight;
  state.highest = highest;
  for (int64_t d = 0; d < padded_dim; d += W)
    store(total + d, fma(load(chunk_total + d), broadcast(new_weight), mul(load(total + d), broadcast(old_weight))));
}

/// Lets a sink logit join the denominator.
inline void fold_sink(RowState& state, float* total, float sink, int64_t padded_dim) {
  if (sink == kNoKey) return;
  if (state.sum == 0) {
    state = {sink, 1.0f};
    std::fill(total, total + padded_dim, 0.0f);
    return;
  }
  const float highest = std::max(state.highest, sink);
  const float weight = exp_of(state.highest - highest);
  state.sum = state.sum * weight + exp_of(sink - highest);
  state.highest = highest;
  for (int64_t d = 0; d < padded_dim; d += Vec::kLanes) store(total + d, mul(load(total + d), broadcast(weight)));
}

/// The row's result in the dtype of `out`, and its log-sum-exp where asked for.
template <typename T>
inline void finish_row(const RowState& state, const float* total, int64_t dim, T* out, float* lse) {
  const bool empty = state.sum == 0;
  if (lse) *lse = empty ? kNoKey : state.highest + std::log(state.sum);
  for (int64_t d = 0; d < dim; d += 8) {
    float result[8];
    for (int i = 0; i < 8; ++i) result[i] = empty ? 0.0f : total[d + i] / state.sum;
    store8_as(out + d, result);
  }
}

}  // namespace pagedkv
