#pragma once

#include "attention_call.h"
#include "attention_rows.h"
#include "attention_tiles.h"
#include "attention_work.h"
#include "scratch.h"

#include <algorithm>

/// What one thread does with one item of work.
namespace pagedkv {

/// Such blocks between a prefetch and its use. One block is too late, and more than these gain nothing.
constexpr int kUnitsAhead = 6;
/// Tokens unpacked at a time: K or V of 128 columns then fit the first-level cache.
constexpr int kPackedBlock = 32;

/// One thread's view of a call: scratch for one item, reused from item to item. Rows are ordered head, token, head of the group.
template <typename T>
class Worker {
  static constexpr int kBlock = kDirectBlock<T>;

 public:
  static int64_t num_floats(const Call& call, int64_t rows) {
    int64_t floats = 0;
    Worker(call, rows, nullptr, &floats);
    return floats;
  }

  Worker(const Call& call, int64_t rows, float* scratch, int64_t* floats_used = nullptr) : call_(call) {
    Carver carver(scratch);
    query_ = carver.take<float>(rows * call.padded_dim);
    scores_ = carver.take<float>(rows * kChunkTokens);
    chunk_total_ = carver.take<float>(rows * call.padded_value_dim);
    total_ = carver.take<float>(rows * call.padded_value_dim);
    unpacked_ = carver.take<float>(kPackedBlock * std::max(call.padded_dim, call.padded_value_dim));
    state_ = carver.take<RowState>(rows);
    chunk_state_ = carver.take<RowState>(rows);
    views_ = carver.take<RowView>(rows);
    if (floats_used) *floats_used = carver.num_floats();
  }

  void run(const AttentionItem& item) {
    begin(item);
    ChunkRows<T> rows[2];
    rows[item.chunk_first & 1].collect(call_, item.sequence, item.chunk_first, visible_);
    for (int64_t chunk = item.chunk_first; chunk < item.chunk_last; ++chunk) {
      ChunkRows<T>&here = rows[chunk & 1], &next = rows[(chunk + 1) & 1];
      next.collect(call_, item.sequence, chunk + 1, visible_);
      if (here.first >= here.last) continue;
      view_rows(chunk);
      std::fill(chunk_total_, chunk_total_ + num_rows_ * call_.padded_value_dim, 0.0f);
      const bool direct = rows_a_head_ <= kDirectRows;
      direct ? score_direct(here, next) : score_packed(here);
      for (int64_t r = 0; r < num_rows_; ++r)
        chunk_state_[r] = softmax_chunk(scores_ + r * kChunkTokens, call_.rule, views_[r]);
      direct ? weigh_direct(here, next) : weigh_packed(here);
      leave_chunk(chunk);
    }
    if (item.state < 0) finish_item();
  }

 private:
  void begin(const AttentionItem& item) {
    const AttentionBatch& batch = call_.batch;
    item_ = &item;
    query_start_ = batch.query_indptr[item.sequence];
    query_len_ = batch.query_indptr[item.sequence + 1] - query_start_;
    kv_len_ = batch.seq_lens[item.sequence];
    num_tokens_ = item.token_last - item.token_first;
    rows_a_head_ = static_cast<int>(num_tokens_ * batch.group);
    num_heads_ = item.head_last - item.head_first;
    num_rows_ = rows_a_head_ * num_heads_;
    visible_ = {visible_keys(batch, kv_len_, query_len_, item.token_first).first,
                visible_keys(batch, kv_len_, query_len_, item.token_last - 1).last};
    for (int64_t r = 0; r < num_rows_; ++r) {
      state_[r] = {};
      load_query_row(call_, token_of(r), head_of(r), query_ + r * call_.padded_dim);
    }
  }

  int64_t token_in_sequence(int64_t row) const { return item_->token_first + row % rows_a_head_ / call_.batch.group; }
  int64_t token_of(int64_t row) const { return query_start_ + token_in_sequence(row); }
  int64_t head_of(int64_t row) const {
    return (item_->head_first + row / rows_a_head_) * call_.batch.group + row % call_.batch.group;
  }

  void view_rows(int64_t chunk) {
    const int64_t start = chunk * kChunkTokens;
    for (int64_t r = 0; r < num_rows_; ++r) {
      const int64_t token = token_in_sequence(r);
      const KeyRange keys = visible_keys(call_.batch, kv_len_, query_len_, token);
      RowView& view = views_[r];
      view.first = static_cast<int>(std::max(keys.first - start, int64_t{0}));
      view.last = static_cast<int>(std::min(keys.last - start, int64_t{kChunkTokens}));
      if (view.first >= view.last) view.first = view.last = 0;
      view.mask = call_.mask ? call_.mask + call_.mask_indptr[item_->sequence] + token * kv_len_ + start : nullptr;
      view.alibi_slope = call_.alibi_slopes ? call_.alibi_slopes[head_of(r)] : 0.0f;
      view.alibi_start = static_cast<float>(start - (kv_len_ - query_len_ + token));
    }
  }

  ListedRows<T> key_rows(const ChunkRows<T>& chunk, int64_t head) const {
    return {chunk.key, (item_->head_first + head) * call_.keys.head_stride};
  }
  ListedRows<T> value_rows_of(const ChunkRows<T>& chunk, int64_t head) const {
    return {chunk.value, (item_->head_first + head) * call_.values.head_stride};
  }

  /// Block by block through the chunk, all heads of a block in turn: memory is walked nearly in order in either layout.
  void score_direct(const ChunkRows<T>& chunk, const ChunkRows<T>& following) {
    const int dim = static_cast<int>(call_.batch.head_dim);
    const int tile = std::min(rows_a_head_, kDirectTile);
    const int64_t steps = (rows_a_head_ + kDirectTile - 1) / kDirectTile * (kBlock / score_tokens(tile));
    int64_t unit = 0;
    for (int block = first_block(chunk); block < chunk.last; block += kBlock) {
      for (int64_t head = 0; head < num_heads_; ++head) {
        RowPrefetcher<T> ahead = prefetcher(chunk, following, unit++ + kUnitsAhead, steps);
        for (int r = 0; r < rows_a_head_; r += kDirectTile) {
          const int64_t row = head * rows_a_head_ + r;
          score_rows<kDirectTile>(std::min(kDirectTile, rows_a_head_ - r), query_ + row * call_.padded_dim,
                                  call_.padded_dim, key_rows(chunk, head), block, block + kBlock, dim,
                                  scores_ + row * kChunkTokens, kChunkTokens, ahead);
        }
      }
    }
  }

  void weigh_direct(const ChunkRows<T>& chunk, const ChunkRows<T>& following) {
    const int tile = std::min(rows_a_head_, kDirectTile);
    const int64_t steps = (rows_a_head_ + kDirectTile - 1) / kDirectTile *
                          std::max<int64_t>(1, call_.batch.value_dim / (value_vecs(tile) * Vec::kLanes));
    int64_t unit = num_blocks(chunk) * num_heads_;
    for (int block = first_block(chunk); block < chunk.last; block += kBlock) {
      for (int64_t head = 0; head < num_heads_; ++head) {
        RowPrefetcher<T> ahead = prefetcher(chunk, following, unit++ + kUnitsAhead, steps);
        for (int r = 0; r < rows_a_head_; r += kDirectTile)
          weigh_rows<kDirectTile>(head * rows_a_head_ + r, std::min(kDirectTile, rows_a_head_ - r),
                                  value_rows_of(chunk, head), 0, block, block + kBlock, ahead);
      }
    }
  }

  static int first_block(const ChunkRows<T>& chunk) { return chunk.first & ~(kBlock - 1); }
  static int64_t num_blocks(const ChunkRows<T>& chunk) {
    return (chunk.last - first_block(chunk) + kBlock - 1) / kBlock;
  }

  /// Loads of the unit-th (block, head) of a chunk: first its keys, then its values, then the keys of the chunk that follows.
  RowPrefetcher<T> prefetcher(const ChunkRows<T>& chunk, const ChunkRows<T>& following, int64_t unit, int64_t steps) const {
    const int64_t a_side = num_blocks(chunk) * num_heads_;
    if (unit < a_side) {
      return {chunk.key + first_block(chunk) + unit / num_heads_ * kBlock, key_rows(chunk, unit % num_heads_).offset,
              kBlock, call_.batch.head_dim, steps};
    }
    unit -= a_side;
    if (unit < a_side) {
      return {chunk.value + first_block(chunk) + unit / num_heads_ * kBlock,
              value_rows_of(chunk, unit % num_heads_).offset, kBlock, call_.batch.value_dim, steps};
    }
    unit -= a_side;
    if (following.first >= following.last || unit >= num_blocks(following) * num_heads_) return {};
    return {following.key + first_block(following) + unit / num_heads_ * kBlock,
            key_rows(following, unit % num_heads_).offset, kBlock, call_.batch.head_dim, steps};
  }

  /// Unpacks block by block; each block serves all rows of the tile.
  void score_packed(const ChunkRows<T>& chunk) {
    const int dim = static_cast<int>(call_.padded_dim);
    RowPrefetcher<float> none;
    for (int block = chunk.first & ~(kPackedBlock - 1); block < chunk.last; block += kPackedBlock) {
      const int first = std::max(block, chunk.first & ~7), last = std::min(block + kPackedBlock, (chunk.last + 7) & ~7);
      unpack(key_rows(chunk, 0), first, last, block, call_.batch.head_dim, dim);
      const PackedRows rows{unpacked_, dim};
      for (int r = 0; r < rows_a_head_; r += kPackedScoreTile) {
        const int count = std::min(kPackedScoreTile, rows_a_head_ - r);
        const KeyRange seen = seen_by_any(r, count, first, last);
        if (seen.first >= seen.last) continue;
        score_rows<kPackedScoreTile>(count, query_ + int64_t{r} * dim, dim, rows, (static_cast<int>(seen.first) & ~7) - block,
                                     ((static_cast<int>(seen.last) + 7) & ~7) - block, dim,
                                     scores_ + int64_t{r} * kChunkTokens + block, kChunkTokens, none);
      }
    }
  }

  void weigh_packed(const ChunkRows<T>& chunk) {
    const int64_t dim = call_.padded_value_dim;
    RowPrefetcher<float> none;
    for (int block = chunk.first & ~(kPackedBlock - 1); block < chunk.last; block += kPackedBlock) {
      const int first = std::max(block, chunk.first), last = std::min(block + kPackedBlock, chunk.last);
      unpack(value_rows_of(chunk, 0), first, last, block, call_.batch.value_dim, dim);
      const PackedRows rows{unpacked_, dim};
      for (int r = 0; r < rows_a_head_; r += kPackedValueTile)
        weigh_rows<kPackedValueTile>(r, std::min(kPackedValueTile, rows_a_head_ - r), rows, block, first, last, none);
    }
  }

  void unpack(const ListedRows<T>& rows, int first, int last, int block, int64_t dim, int64_t padded_dim) {
    constexpr int W = Vec::kLanes;
    for (int t = first; t < last; ++t) {
      const T* source = rows(t);
      float* target = unpacked_ + (t - block) * padded_dim;
      int64_t d = 0;
      for (; d + W <= dim; d += W) store(target + d, load(source + d));
      if (d < dim) store(target + d, load_lower(source + d));
    }
  }

  KeyRange seen_by_any(int row, int count, int first, int last) const {
    KeyRange seen{last, first};
    for (int r = row; r < row + count; ++r) {
      if (views_[r].first >= views_[r].last) continue;
      seen.first = std::min<int64_t>(seen.first, std::max(first, views_[r].first));
      seen.last = std::max<int64_t>(seen.last, std::min(last, views_[r].last));
    }
    return seen;
  }

  /// Adds the values of tokens [first, last) to `count` rows: in one tile where all see the same tokens, row by row where not.
  /// A value that a row does not see never meets it, so it may be NaN. `base` is the token at which `rows` starts.
  template <int kTile, typename Rows>
  void weigh_rows(int64_t row, int count, const Rows& rows, int base, int first, int last,
                  RowPrefetcher<typename Rows::Element>& next) {
    int common_first = first, common_last = last;
    bool masked = false;
    for (int64_t r = row; r < row + count; ++r) {
      common_first = std::max(common_first, views_[r].first);
      common_last = std::min(common_last, views_[r].last);
    }
    for (int64_t r = row; r < row + count && views_[r].mask && common_first < common_last; ++r)
      masked |= std::find(views_[r].mask + common_first, views_[r].mask + common_last, 0) != views_[r].mask + common_last;
    if (common_first >= common_last || masked) common_first = common_last = last;
    for (int64_t r = row; r < row + count; ++r)
      weigh_row(r, rows, base, std::max(first, views_[r].first), std::min(common_first, views_[r].last), next);
    if (common_first >= common_last) return;
    weigh<kTile>(row, count, rows, base, common_first, common_last, next);
    for (int64_t r = row; r < row + count; ++r) weigh_row(r, rows, base, common_last, std::min(last, views_[r].last), next);
  }

  /// Run by run of tokens that the row sees.
  template <typename Rows>
  void weigh_row(int64_t row, const Rows& rows, int base, int first, int last, RowPrefetcher<typename Rows::Element>& next) {
    const uint8_t* mask = views_[row].mask;
    while (first < last) {
      int run = last;
      if (mask) {
        while (first < last && !mask[first]) ++first;
        run = first;
        while (run < last && mask[run]) ++run;
      }
      if (first < run) weigh<1>(row, 1, rows, base, first, run, next);
      first = run;
    }
  }

  template <int kTile, typename Rows>
  void weigh(int64_t row, int count, const Rows& rows, int base, int first, int last,
             RowPrefetcher<typename Rows::Element>& next) {
    value_rows<kTile>(count, scores_ + row * kChunkTokens + base, kChunkTokens, rows, first - base, last - base,
                      static_cast<int>(call_.batch.value_dim), chunk_total_ + row * call_.padded_value_dim,
                      call_.padded_value_dim, next);
  }

  /// Folds the chunk into the running state, or leaves it for `merge_split` when other chunks are someone else's.
  void leave_chunk(int64_t chunk) {
    const int64_t dim = call_.padded_value_dim;
    const int64_t slot = item_->state + (chunk - item_->chunk_first) * num_rows_;
    for (int64_t r = 0; r < num_rows_; ++r) {
      const float* chunk_total = chunk_total_ + r * dim;
      if (item_->state < 0) {
        fold_chunk(state_[r], total_ + r * dim, chunk_state_[r], chunk_total, dim);
      } else {
        call_.chunk_states[slot + r] = chunk_state_[r];
        std::copy(chunk_total, chunk_total + dim, call_.chunk_totals + (slot + r) * dim);
      }
    }
  }

  void finish_item() {
    for (int64_t r = 0; r < num_rows_; ++r) {
      float* total = total_ + r * call_.padded_value_dim;
      if (call_.sinks) fold_sink(state_[r], total, call_.sinks[head_of(r)], call_.padded_value_dim);
      finish(call_, state_[r], total, token_of(r), head_of(r));
    }
  }

  const Call& call_;
  const AttentionItem* item_ = nullptr;
  float *query_, *scores_, *chunk_total_, *total_, *unpacked_;
  RowState *state_, *chunk_state_;
  RowView* views_;
  int64_t query_start_ = 0, query_len_ = 0, kv_len_ = 0, num_tokens_ = 0, num_heads_ = 0, num_rows_ = 0;
  int rows_a_head_ = 0;
  KeyRange visible_{0, 0};
};

}  // namespace pagedkv
