#pragma once

#include "simd.h"

#include <algorithm>

/// The two inner products of attention, on register tiles.
///
/// Whatever the tile, one score is one chain of multiply-adds over the row in steps of `Vec::kLanes`, then one sum over
/// lanes; one output element is one chain over tokens in order. So tile shapes are free: they never change a bit.
namespace pagedkv {

/// Rows found through a list of addresses, `offset` elements further on.
template <typename T>
struct ListedRows {
  using Element = T;
  const T* const* rows;
  int64_t offset;
  const T* operator()(int token) const { return rows[token] + offset; }
};

/// Rows at one distance from each other.
struct PackedRows {
  using Element = float;
  const float* start;
  int64_t stride;
  const float* operator()(int token) const { return start + token * stride; }
};

/// Starts the loads of rows that a later unit of work reads, a few rows between two tiles: the hardware follows neither a
/// page table nor a head's stride.
template <typename T>
class RowPrefetcher {
 public:
  RowPrefetcher() = default;
  RowPrefetcher(const T* const* rows, int64_t offset, int num_rows, int64_t row_length, int64_t num_steps)
      : rows_(rows),
        end_(rows + num_rows),
        offset_(offset),
        row_bytes_(row_length * static_cast<int64_t>(sizeof(T))),
        rows_a_step_(static_cast<int>((num_rows + num_steps - 1) / num_steps)) {}

  void step() {
    for (int i = 0; i < rows_a_step_ && rows_ < end_; ++i, ++rows_) {
      const char* row = reinterpret_cast<const char*>(*rows_ + offset_);
      for (int64_t at = 0; at < row_bytes_; at += 64) prefetch(row + at);
    }
  }

 private:
  const T* const* rows_ = nullptr;
  const T* const* end_ = nullptr;
  int64_t offset_ = 0, row_bytes_ = 0;
  int rows_a_step_ = 0;
};

/// scores[r][t] = query[r] . rows(t) for kRows rows and the kTokens tokens from `token` on. `query` rows are padded with zeros
/// to whole vectors.
template <int kRows, int kTokens, typename Rows>
inline void score_tile(const float* query, int64_t query_stride, const Rows& rows, int token, int dim, float* scores,
                       int64_t score_stride) {
  constexpr int W = Vec::kLanes;
  using T = typename Rows::Element;
  const T* key[kTokens];
  for (int t = 0; t < kTokens; ++t) key[t] = rows(token + t);
  Vec sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = zero();
  int d = 0;
  for (; d + W <= dim; d += W) {
    Vec q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = load(query + r * query_stride + d);
    for (int t = 0; t < kTokens; ++t) {
      const Vec k = load(key[t] + d);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(q[r], k, sum[r][t]);
    }
  }
  if (W == 16 && d < dim) {
    for (int t = 0; t < kTokens; ++t) {
      const Vec k = load_lower(key[t] + d);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(load(query + r * query_stride + d), k, sum[r][t]);
    }
  }
  if constexpr (kTokens % 4 == 0) {
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; t += 4)
        reduce4(sum[r][t], sum[r][t + 1], sum[r][t + 2], sum[r][t + 3], scores + r * score_stride + token + t);
  } else {
    static_assert(kRows == 4, "sums are taken four at a time");
    for (int t = 0; t < kTokens; ++t) {
      float of_rows[4];
      reduce4(sum[0][t], sum[1][t], sum[2][t], sum[3][t], of_rows);
      for (int r = 0; r < 4; ++r) scores[r * score_stride + token + t] = of_rows[r];
    }
  }
}

/// total[r][.] += weights[r][t] * rows(t)[.] over tokens [first, last), for kRows rows and kVecs vectors.
template <int kRows, int kVecs, bool kLower, typename Rows>
inline void value_tile(const float* weights, int64_t weight_stride, const Rows& rows, int first, int last, int column,
                       float* total, int64_t total_stride) {
  constexpr int W = Vec::kLanes;
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load(total + r * total_stride + column + j * W);
  for (int t = first; t < last; ++t) {
    const auto* value = rows(t) + column;
    Vec v[kVecs];
    for (int j = 0; j < kVecs; ++j) v[j] = kLower ? load_lower(value + j * W) : load(value + j * W);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * weight_stride + t]);
      for (int j = 0; j < kVecs; ++j) sum[r][j] = fma(weight, v[j], sum[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVecs; ++j) store(total + r * total_stride + column + j * W, sum[r][j]);
}

/// Tokens of a score tile of so many rows: enough chains to hide the latency of a multiply-add, as many as registers hold.
constexpr int score_tokens(int rows) {
#if defined(__AVX512F__)
  return rows <= 2 ? 8 : 4;
#else
  return rows == 1 ? 8 : (rows <= 3 ? 4 : 2);
#endif
}

/// Vectors of a value tile of so many rows.
constexpr int value_vecs(int rows) {
#if defined(__AVX512F__)
  return rows <= 2 ? 8 : 4;
#else
  return rows == 1 ? 8 : (rows <= 3 ? 4 : 2);
#endif
}

/// Rows of a tile over pages read in place, and over unpacked float32.
constexpr int kDirectTile = 4;
#if defined(__AVX512F__)
constexpr int kPackedScoreTile = 6;
#else
constexpr int kPackedScoreTile = 3;
#endif
constexpr int kPackedValueTile = 6;

/// Scores of `num_rows` (<= kRows) rows and tokens [first, last); last - first is a multiple of 8.
template <int kRows, typename Rows>
inline void score_rows(int num_rows, const float* query, int64_t query_stride, const Rows& rows, int first, int last,
                       int dim, float* scores, int64_t score_stride, RowPrefetcher<typename Rows::Element>& next) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows)
      return score_rows<kRows - 1>(num_rows, query, query_stride, rows, first, last, dim, scores, score_stride, next);
  }
  constexpr int kTokens = score_tokens(kRows);
  for (int t = first; t < last; t += kTokens) {
    next.step();
    score_tile<kRows, kTokens>(query, query_stride, rows, t, dim, scores, score_stride);
  }
}

/// `value_tile` over columns [column, dim), kVecs vectors at a time, then narrower.
template <int kRows, int kVecs, typename Rows>
inline void value_columns(const float* weights, int64_t weight_stride, const Rows& rows, int first, int last, int column,
                          int dim, float* total, int64_t total_stride, RowPrefetcher<typename Rows::Element>& next) {
  constexpr int W = Vec::kLanes;
  for (; column + kVecs * W <= dim; column += kVecs * W) {
    next.step();
    value_tile<kRows, kVecs, false>(weights, weight_stride, rows, first, last, column, total, total_stride);
  }
  if (column >= dim) return;
  if constexpr (kVecs > 1) {
    value_columns<kRows, kVecs / 2>(weights, weight_stride, rows, first, last, column, dim, total, total_stride, next);
  } else if constexpr (W > 8) {
    value_tile<kRows, 1, true>(weights, weight_stride, rows, first, last, column, total, total_stride);
  }
}

/// Weighted values of `num_rows` (<= kRows) rows over tokens [first, last).
template <int kRows, typename Rows>
inline void value_rows(int num_rows, const float* weights, int64_t weight_stride, const Rows& rows, int first, int last,
                       int dim, float* total, int64_t total_stride, RowPrefetcher<typename Rows::Element>& next) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows)
      return value_rows<kRows - 1>(num_rows, weights, weight_stride, rows, first, last, dim, total, total_stride, next);
  }
  value_columns<kRows, value_vecs(kRows)>(weights, weight_stride, rows, first, last, 0, dim, total, total_stride, next);
}

}  // namespace pagedkv
