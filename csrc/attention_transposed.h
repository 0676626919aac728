#pragma once

#include "attention_chunk.h"
#include "attention_tiles.h"
#include "simd_transpose.h"

#include <algorithm>

/// Scores of many rows, with tokens in the lanes: keys turned over once serve every row without a sum over lanes.
namespace pagedkv {

/// A block of keys, column by column: kPackedBlock tokens each. Columns that meet in one lane of a row's vectors stand together.
struct TransposedKeys {
  float* start;
  int64_t columns_a_lane;

  static int64_t num_floats(int64_t padded_dim) { return kPackedBlock * padded_dim; }

  float* column(int lane, int64_t nth) const { return start + (lane * columns_a_lane + nth) * kPackedBlock; }

  /// Takes rows [first, last), at most kPackedBlock; whole vectors of tokens are written, what lies beyond is `last - 1` again.
  template <typename Rows>
  void fill(const Rows& keys, int first, int last, int64_t dim) const {
    constexpr int W = Vec::kLanes;
    // A line of every key before the next line of any: what lies far apart may share a few sets of the cache.
    constexpr int kStep = std::max(1, kColumnsALine<typename Rows::Element> / W);
    const FewRows<Rows> few{keys, last - 1};
    for (int64_t begin = 0; begin < columns_a_lane; begin += kStep) {
      const int64_t end = std::min(begin + kStep, columns_a_lane);
      for (int t = first; t < last; t += W) {
        for (int64_t nth = begin; nth < end; ++nth) {
          Vec square[W];
          const bool whole = (nth + 1) * W <= dim;
          for (int i = 0; i < W; ++i) square[i] = whole ? load(few(t + i) + nth * W) : load_lower(few(t + i) + nth * W);
          transpose(square);
          for (int lane = 0; lane < W; ++lane) store(column(lane, nth) + t - first, square[lane]);
        }
      }
    }
  }
};

/// scores[r][.] = query[r] . keys for kRows rows and kVecs vectors of tokens from `token` of the block on, the bits those of
/// `score_tile`: one chain of multiply-adds for each lane there, and their sums in the order of `reduce4`.
template <int kRows, int kVecs>
[[gnu::noinline]] void transposed_tile(const float* query, int64_t query_stride, const TransposedKeys& keys, int token,
                                       float* scores, int64_t score_stride) {
  constexpr int W = Vec::kLanes;
  constexpr int kLevels = W == 16 ? 4 : (W == 8 ? 3 : 2);
  Vec waiting[kLevels][kRows][kVecs];
  for (int n = 0; n < W; ++n) {
    const int lane = sum_order(n);
    Vec sum[kRows][kVecs];
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kVecs; ++j) sum[r][j] = zero();
    const float *column = keys.column(lane, 0) + token, *q = query + lane;
    for (int64_t nth = 0; nth < keys.columns_a_lane; ++nth, column += kPackedBlock, q += W) {
      Vec k[kVecs];
      for (int j = 0; j < kVecs; ++j) k[j] = load(column + j * W);
      for (int r = 0; r < kRows; ++r) {
        const Vec x = broadcast(q[r * query_stride]);
        for (int j = 0; j < kVecs; ++j) sum[r][j] = fma(x, k[j], sum[r][j]);
      }
    }
    // What has waited longest is added last, as carries run through a counter.
    int level = 0;
    for (; n >> level & 1; ++level)
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVecs; ++j) sum[r][j] = add(waiting[level][r][j], sum[r][j]);
    if (level < kLevels) {
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVecs; ++j) waiting[level][r][j] = sum[r][j];
    } else {
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kVecs; ++j) store(scores + r * score_stride + j * W, sum[r][j]);
    }
  }
}

/// Scores of `num_rows` (<= kRows) rows and tokens [first, last) of the block that begins with token `start`. Up to a vector
/// of scores on either side becomes undefined.
template <int kRows>
inline void transposed_rows(int num_rows, const float* query, int64_t query_stride, const TransposedKeys& keys, int start,
                            int first, int last, float* scores, int64_t score_stride, RowPrefetcher& next) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows)
      return transposed_rows<kRows - 1>(num_rows, query, query_stride, keys, start, first, last, scores, score_stride, next);
  }
  constexpr int W = Vec::kLanes;
  for (int t = start + (first - start) / W * W; t < last;) {
    next.step();
    if (t + W < last) {
      transposed_tile<kRows, 2>(query, query_stride, keys, t - start, scores + t, score_stride);
      t += 2 * W;
    } else {
      transposed_tile<kRows, 1>(query, query_stride, keys, t - start, scores + t, score_stride);
      t += W;
    }
  }
}

}  // namespace pagedkv
