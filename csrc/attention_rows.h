#pragma once

#include "simd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

/// What is kept of one query row from chunk to chunk, and how chunks are folded together.
namespace pagedkv {

constexpr float kNoKey = -std::numeric_limits<float>::infinity();

/// How raw dot products become logits.
struct LogitRule {
  float scale, soft_cap;
};

/// Entries between the scores of two rows: a chunk, and room for tiles that run over. No power of two, so that the rows of a
/// tile do not meet in the same sets of the cache.
constexpr int kScoreStride = 256 + 16;

/// What one row sees of one chunk: tokens [first, last), less those that `mask` has 0 for.
struct RowView {
  int first, last;
  const uint8_t* mask;  // by token of the chunk, or null
};

/// What variants know of a row beside its products: scales by token of the chunk (null: all 1), and positions in the sequence.
struct RowAt {
  int64_t query_head, position, chunk_start;
  const float *key_scales, *value_scales;
};

/// Largest logit and sum of exponentials of one row over one chunk, or over all chunks so far; sum 0: no key seen.
struct RowState {
  float highest = kNoKey, sum = 0;
};

/// The larger of two logits, and what sums relative to each of them weigh relative to it.
struct Weights {
  float highest, old_weight, new_weight;
};

inline Weights weights_of(float old_highest, float new_highest) {
  // e^0 without the exponential; still NaN for an infinite logit.
  if (old_highest >= new_highest) return {old_highest, 1.0f + (old_highest - old_highest), exp_of(new_highest - old_highest)};
  return {new_highest, exp_of(old_highest - new_highest), 1.0f + (new_highest - new_highest)};
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
  const auto [highest, old_weight, new_weight] = weights_of(state.highest, chunk.highest);
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

inline float log_sum(const RowState& state) { return state.sum == 0 ? kNoKey : state.highest + std::log(state.sum); }

/// The row's result in the dtype of `out`; exactly 0 where no key was seen.
template <typename T>
inline void store_result(const RowState& state, const float* total, float factor, int64_t dim, T* out) {
  const bool empty = state.sum == 0;
  for (int64_t d = 0; d < dim; d += 8) {
    float result[8];
    for (int i = 0; i < 8; ++i) result[i] = empty ? 0.0f : total[d + i] / state.sum * factor;
    store8_as(out + d, result);
  }
}

}  // namespace pagedkv
