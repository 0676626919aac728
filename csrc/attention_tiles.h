#pragma once

#include "simd.h"

#include <algorithm>

/// The two inner products of attention, on register tiles.
///
/// Whatever the tile, one score is one chain of multiply-adds over the row in steps of `Vec::kLanes`, then one sum over
/// lanes; one output element is one chain over tokens in order. So tile shapes are free: they never change a bit.
namespace pagedkv {

/// Rows found through a list of addresses, `offset` elements further on. While a row is worked on, the loads of the row `lead`
/// entries later start: the hardware follows neither a page table nor a head's stride.
template <typename T>
struct ListedRows {
  using Element = T;
  const T* const* rows;
  int64_t offset;
  int lead = 0;

  const T* operator()(int token) const { return rows[token] + offset; }
  void load_ahead(int token, int64_t column) const { prefetch(rows[token + lead] + offset + column); }
};

/// Rows at one distance from each other, in a cache already.
struct PackedRows {
  using Element = float;
  const float* start;
  int64_t stride;

  const float* operator()(int token) const { return start + token * stride; }
  void load_ahead(int, int64_t) const {}
};

/// Rows of which only those up to `last` exist; what is asked for beyond is `last` again.
template <typename Rows>
struct FewRows {
  using Element = typename Rows::Element;
  const Rows& rows;
  int last;

  const Element* operator()(int token) const { return rows(std::min(token, last)); }
  void load_ahead(int, int64_t) const {}
};

template <typename T>
constexpr int kColumnsALine = 64 / static_cast<int>(sizeof(T));

/// Starts the loads of the rows of a later block, a few rows between two tiles.
class RowPrefetcher {
 public:
  RowPrefetcher() = default;

  template <typename T>
  RowPrefetcher(const ListedRows<T>& rows, int first, int num_rows, int64_t row_length, int64_t num_steps)
      : rows_(reinterpret_cast<const char* const*>(rows.rows + first)),
        end_(rows_ + num_rows),
        offset_(rows.offset * static_cast<int64_t>(sizeof(T))),
        row_bytes_(row_length * static_cast<int64_t>(sizeof(T))),
        rows_a_step_(static_cast<int>((num_rows + num_steps - 1) / num_steps)) {}

  void step() {
    for (int i = 0; i < rows_a_step_ && rows_ < end_; ++i, ++rows_) {
      const char* row = *rows_ + offset_;
      for (int64_t at = 0; at < row_bytes_; at += 64) prefetch(row + at);
    }
  }

 private:
  const char* const* rows_ = nullptr;
  const char* const* end_ = nullptr;
  int64_t offset_ = 0, row_bytes_ = 0;
  int rows_a_step_ = 0;
};

/// scores[r][t] = query[r] . rows(t) for kRows rows and the kTokens tokens from `token` on. `query` rows are padded with zeros
/// to whole vectors.
template <int kRows, int kTokens, typename Rows>
[[gnu::noinline]] void score_tile(const float* query, int64_t query_stride, const Rows& rows, int token, int dim,
                                  float* scores, int64_t score_stride) {
  constexpr int W = Vec::kLanes;
  decltype(rows(0)) key[kTokens];
  for (int t = 0; t < kTokens; ++t) key[t] = rows(token + t);
  Vec sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = zero();
  // The shorter side waits in registers while the longer passes: sums and operands just fill the register file.
  const auto add_products = [&](int d) {
    if constexpr (kTokens < kRows) {
      Vec k[kTokens];
      for (int t = 0; t < kTokens; ++t) k[t] = load(key[t] + d);
      for (int r = 0; r < kRows; ++r) {
        const Vec q = load(query + r * query_stride + d);
        for (int t = 0; t < kTokens; ++t) sum[r][t] = fma(q, k[t], sum[r][t]);
      }
    } else {
      Vec q[kRows];
      for (int r = 0; r < kRows; ++r) q[r] = load(query + r * query_stride + d);
      for (int t = 0; t < kTokens; ++t) {
        const Vec k = load(key[t] + d);
        for (int r = 0; r < kRows; ++r) sum[r][t] = fma(q[r], k, sum[r][t]);
      }
    }
  };
  constexpr int kLine = kColumnsALine<typename Rows::Element>;
  int d = 0;
  for (; d + kLine <= dim; d += kLine) {
    for (int t = 0; t < kTokens; ++t) rows.load_ahead(token + t, d);
    for (int column = d; column < d + kLine; column += W) add_products(column);
  }
  for (; d + W <= dim; d += W) add_products(d);
  if (W == 16 && d < dim) {
    for (int t = 0; t < kTokens; ++t) {
      const Vec k = load_lower(key[t] + d);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(load(query + r * query_stride + d), k, sum[r][t]);
    }
  }
  constexpr int kSums = kRows * kTokens;
  float sums[kSums + 3];
  for (int i = 0; i < kSums; i += 4) {
    const auto nth = [&](int n) { return n < kSums ? sum[n % kRows][n / kRows] : zero(); };
    reduce4(nth(i), nth(i + 1), nth(i + 2), nth(i + 3), sums + i);
  }
  for (int i = 0; i < kSums; ++i) scores[i % kRows * score_stride + token + i / kRows] = sums[i];
}

/// total[r][.] += weights[r][t] * rows(t)[.] over tokens [first, last), for kRows rows and kVecs vectors.
template <int kRows, int kVecs, bool kLower, typename Rows>
inline void value_tile(const float* weights, int64_t weight_stride, const Rows& rows, int first, int last, int column,
                       float* total, int64_t total_stride) {
  constexpr int W = Vec::kLanes;
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kVecs; ++j) sum[r][j] = load(total + r * total_stride + column + j * W);
  constexpr int kLine = kColumnsALine<typename Rows::Element>, kLines = (kVecs * W + kLine - 1) / kLine;
  for (int t = first; t < last; ++t) {
    for (int line = 0; line + 1 < kLines; ++line) rows.load_ahead(t, column + line * kLine);
    rows.load_ahead(t, column + kVecs * W - 1);
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
  return rows == 1 ? 8 : (rows == 2 ? 6 : (rows == 3 ? 4 : (rows == 4 ? 3 : 2)));
#endif
}

/// Vectors of a value tile of so many rows.
constexpr int value_vecs(int rows) {
#if defined(__AVX512F__)
  return rows <= 2 ? 8 : 4;
#else
  return rows == 1 ? 8 : (rows <= 3 ? 4 : (rows == 4 ? 3 : 2));
#endif
}

/// Rows of a tile over pages read in place, and over unpacked float32.
constexpr int kDirectTile = 4;
constexpr int kPackedTile = 6;

/// Scores of `num_rows` (<= kRows) rows and tokens [first, last). Tiles that do not divide the tokens step back; where that
/// is not possible, up to 7 scores and sums beyond `last` become undefined.
template <int kRows, typename Rows>
inline void score_rows(int num_rows, const float* query, int64_t query_stride, const Rows& rows, int first, int last,
                       int dim, float* scores, int64_t score_stride) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows)
      return score_rows<kRows - 1>(num_rows, query, query_stride, rows, first, last, dim, scores, score_stride);
  }
  constexpr int kTokens = score_tokens(kRows);
  for (int t = first; t < last; t += kTokens) {
    if (last - first >= kTokens) {
      score_tile<kRows, kTokens>(query, query_stride, rows, std::min(t, last - kTokens), dim, scores, score_stride);
    } else {
      const FewRows<Rows> few{rows, last - 1};
      score_tile<kRows, kTokens>(query, query_stride, few, t, dim, scores, score_stride);
    }
  }
}

/// `value_tile` over columns [column, dim), kVecs vectors at a time, then narrower.
template <int kRows, int kVecs, typename Rows>
inline void value_columns(const float* weights, int64_t weight_stride, const Rows& rows, int first, int last, int column,
                          int dim, float* total, int64_t total_stride, RowPrefetcher& next) {
  constexpr int W = Vec::kLanes;
  // Four vectors left over from threes are two tiles of two, not one of three and one of a single vector.
  for (; column + kVecs * W <= dim && !(kVecs == 3 && column + 4 * W == dim); column += kVecs * W) {
    next.step();
    value_tile<kRows, kVecs, false>(weights, weight_stride, rows, first, last, column, total, total_stride);
  }
  if (column >= dim) return;
  if constexpr (kVecs > 1) {
    value_columns<kRows, (kVecs + 1) / 2>(weights, weight_stride, rows, first, last, column, dim, total, total_stride, next);
  } else if constexpr (W > 8) {
    value_tile<kRows, 1, true>(weights, weight_stride, rows, first, last, column, total, total_stride);
  }
}

/// Weighted values of `num_rows` (<= kRows) rows over tokens [first, last); columns [0, dim) of rows and totals.
template <int kRows, typename Rows>
inline void value_rows(int num_rows, const float* weights, int64_t weight_stride, const Rows& rows, int first, int last,
                       int dim, float* total, int64_t total_stride, RowPrefetcher& next) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows)
      return value_rows<kRows - 1>(num_rows, weights, weight_stride, rows, first, last, dim, total, total_stride, next);
  }
  value_columns<kRows, value_vecs(kRows)>(weights, weight_stride, rows, first, last, 0, dim, total, total_stride, next);
}

}  // namespace pagedkv
