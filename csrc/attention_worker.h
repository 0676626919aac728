#pragma once

#include "attention_call.h"
#include "attention_chunk.h"
#include "attention_softmax.h"
#include "attention_tiles.h"
#include "attention_transposed.h"
#include "scratch.h"

#include <algorithm>

/// What one thread does with one item of work.
namespace pagedkv {

/// Tokens of one head between two heads when values are read in place: few, so that memory is walked nearly in order and the
/// hardware follows, but enough to pay for loading and storing the sums of a tile.
constexpr int kValueBlock = 8;

/// Up to so many rows, keys that are unpacked are not turned over, and this many of them are unpacked at a time.
constexpr int kFewRows = 16;
constexpr int kUnpackedBlock = 48;

/// One thread's view of a call: scratch for one item, reused from item to item. The rows of an item are those of its tiles one
/// after the other; every array of rows has them all for the first KV head, then for the next.
template <typename T>
class Worker {
 public:
  static int64_t num_floats(const Call& call) {
    int64_t floats = 0;
    Worker(call, nullptr, &floats);
    return floats;
  }

  Worker(const Call& call, float* scratch, int64_t* floats_used = nullptr)
      : call_(call), softmax_(softmax_of(call)) {
    const int64_t rows = call.work.most_rows;
    Carver carver(scratch);
    query_ = carver.take<float>(rows * call.padded_dim);
    scores_ = carver.take<float>(rows * kScoreStride);
    chunk_total_ = carver.take<float>(rows * call.padded_value_dim);
    total_ = carver.take<float>(rows * call.padded_value_dim);
    unpacked_ = carver.take<float>(kPackedBlock * (std::max(call.padded_dim, call.padded_value_dim) + kUnpackedPad));
    transposed_ = carver.take<float>(TransposedKeys::num_floats(call.padded_dim));
    key_scales_ = carver.take<float>(kScoreStride);
    value_scales_ = carver.take<float>(kScoreStride);
    state_ = carver.take<RowState>(rows);
    chunk_state_ = carver.take<RowState>(rows);
    rows_ = carver.take<Row>(rows);
    views_ = carver.take<RowView>(rows);
    if (floats_used) *floats_used = carver.num_floats();
  }

  void run(const AttentionItem& item) {
    begin(item);
    ChunkRows<T> chunks[2];
    collect(item.chunk_first, chunks[item.chunk_first & 1]);
    for (int64_t chunk = item.chunk_first; chunk < item.chunk_last; ++chunk) {
      ChunkRows<T>&here = chunks[chunk & 1], &next = chunks[(chunk + 1) & 1];
      collect(chunk + 1, next);
      here.lead_to(here.value + here.first, here.last - here.first, next.key + next.first, next.last - next.first);
      chunk_start_ = chunk * kChunkTokens;
      view_rows(chunk);
      std::fill(chunk_total_, chunk_total_ + num_heads_ * num_rows_ * call_.padded_value_dim, 0.0f);
      score(here, 0, num_rows_);
      for_each_own_part(chunk, [&](const ChunkRows<T>& own, int first, int last) { score(own, first, last); });
      soften(chunk, here);
      weigh(here, 0, num_rows_);
      for_each_own_part(chunk, [&](const ChunkRows<T>& own, int first, int last) { weigh(own, first, last); });
      leave_chunk(chunk);
    }
    if (tile(0).state < 0) finish_item();
  }

 private:
  struct Row {
    KeyRange keys;
    int64_t token, position, mask;  // mask: where the row's mask begins
    int head;                       // of the group
  };

  const AttentionTile& tile(int64_t member) const {
    return call_.work.tiles[call_.work.members[item_->member_first + member]];
  }
  int64_t num_members() const { return item_->member_last - item_->member_first; }
  int64_t query_head(int64_t head, int row) const {
    return (item_->head_first + head) * call_.batch.group + rows_[row].head;
  }

  void begin(const AttentionItem& item) {
    const AttentionBatch& batch = call_.batch;
    item_ = &item;
    num_heads_ = item.head_last - item.head_first;
    num_rows_ = 0;
    visible_ = {INT64_MAX, 0};
    for (int64_t member = 0; member < num_members(); ++member) {
      const AttentionTile& rows = tile(member);
      const int64_t kv_len = batch.seq_lens[rows.sequence], q_len = batch.query_len(rows.sequence);
      for (int64_t row = rows.row_first; row < rows.row_last; ++row) {
        const int64_t token = row / batch.group;
        const KeyRange keys = visible_keys(batch, rows.sequence, token);
        if (keys.first < keys.last)
          visible_ = {std::min(visible_.first, keys.first), std::max(visible_.last, keys.last)};
        const int64_t mask = call_.mask ? call_.mask_indptr[rows.sequence] + token * kv_len : 0;
        rows_[num_rows_++] = {keys, batch.query_indptr[rows.sequence] + token, kv_len - q_len + token, mask,
                              static_cast<int>(row % batch.group)};
      }
    }
    if (visible_.first > visible_.last) visible_ = {0, 0};
    for (int64_t head = 0; head < num_heads_; ++head) {
      for (int row = 0; row < num_rows_; ++row) {
        state_[head * num_rows_ + row] = {};
        load_query_row(call_, rows_[row].token, query_head(head, row), rows_[row].position,
                       query_ + (head * num_rows_ + row) * call_.padded_dim);
      }
    }
  }

  /// The rows of keys that all members have in common.
  void collect(int64_t chunk, ChunkRows<T>& rows) const {
    const int64_t start = chunk * kChunkTokens, common = chunk + 1 < item_->chunk_last ? kChunkTokens : item_->shared_tokens;
    rows.first = rows.last = 0;
    if (chunk < item_->chunk_last)
      rows.collect(call_, tile(0).sequence, chunk, {visible_.first - start, std::min(visible_.last - start, common)});
  }

  /// Calls `body` for each member with what it alone sees of the chunk; loads run ahead into what the next one does.
  template <typename Body>
  void for_each_own_part(int64_t chunk, const Body& body) const {
    if (chunk + 1 < item_->chunk_last || item_->shared_tokens == kChunkTokens) return;
    ChunkRows<T> parts[2];
    own_part(chunk, 0, parts[0]);
    int first = 0;
    for (int64_t member = 0; member < num_members(); ++member) {
      ChunkRows<T>&own = parts[member & 1], &next = parts[(member + 1) & 1];
      own_part(chunk, member + 1, next);
      own.lead_to(next.key + next.first, next.last - next.first, next.value + next.first, next.last - next.first);
      const int last = first + static_cast<int>(tile(member).rows());
      if (!own.empty()) body(own, first, last);
      first = last;
    }
  }

  void own_part(int64_t chunk, int64_t member, ChunkRows<T>& rows) const {
    rows.first = rows.last = 0;
    if (member >= num_members()) return;
    const int64_t start = chunk * kChunkTokens, sequence = tile(member).sequence;
    const int64_t first = visible_keys(call_.batch, sequence, tile(member).row_first / call_.batch.group).first;
    const int64_t last = visible_keys(call_.batch, sequence, (tile(member).row_last - 1) / call_.batch.group).last;
    rows.collect(call_, sequence, chunk, {std::max(first - start, item_->shared_tokens), last - start});
  }

  void view_rows(int64_t chunk) {
    const int64_t start = chunk * kChunkTokens;
    all_see_ = {0, call_.mask ? 0 : kChunkTokens};
    for (int row = 0; row < num_rows_; ++row) {
      RowView& view = views_[row];
      view.first = static_cast<int>(std::max(rows_[row].keys.first - start, int64_t{0}));
      view.last = static_cast<int>(std::min(rows_[row].keys.last - start, int64_t{kChunkTokens}));
      if (view.first >= view.last) view.first = view.last = 0;
      view.mask = call_.mask ? call_.mask + rows_[row].mask + start : nullptr;
      all_see_ = {std::max<int64_t>(all_see_.first, view.first), std::min<int64_t>(all_see_.last, view.last)};
    }
  }

  bool in_place(int rows) const { return rows <= kDirectRows && !call_.keys_need_unpacking(); }

  /// Dot products of rows [row_first, row_last) of every head with the keys of a chunk.
  void score(const ChunkRows<T>& chunk, int row_first, int row_last) {
    if (!in_place(row_last - row_first)) {
      for (int64_t head = 0; head < num_heads_; ++head) {
        if (call_.keys_need_unpacking() && row_last - row_first <= kFewRows)
          score_unpacked(chunk, head, row_first, row_last);
        else
          score_transposed(chunk, head, row_first, row_last);
      }
      return;
    }
    const int step = 2 * score_tokens(std::min(row_last - row_first, kDirectTile));
    // A few tokens at a time, all heads in turn: memory is walked nearly in order in either layout.
    for (int block = chunk.first; block < chunk.last; block += step) {
      const int last = std::min(block + step, chunk.last);
      for (int64_t head = 0; head < num_heads_; ++head) {
        for (int row = row_first; row < row_last; row += kDirectTile)
          score_rows<kDirectTile>(std::min(kDirectTile, row_last - row), query(head, row), call_.padded_dim,
                                  chunk.keys(call_, item_->head_first + head, row == row_first ? kTokensAhead : 0), block,
                                  last, static_cast<int>(call_.key_dim), scores(head, row), kScoreStride);
      }
    }
  }

  /// Unpacks keys block by block and takes them as they lie: for few rows, turning them over costs more than it saves.
  void score_unpacked(const ChunkRows<T>& chunk, int64_t head, int row_first, int row_last) {
    const int64_t stride = call_.padded_dim + kUnpackedPad;
    for (int block = chunk.first; block < chunk.last; block += kUnpackedBlock) {
      const int last = std::min(block + kUnpackedBlock, chunk.last);
      unpack_keys(chunk, head, block, last, stride);
      const PackedRows rows{unpacked_ - block * stride, stride};
      for (int row = row_first; row < row_last; row += kDirectTile)
        score_rows<kDirectTile>(std::min(kDirectTile, row_last - row), query(head, row), call_.padded_dim, rows, block, last,
                                static_cast<int>(call_.key_dim + call_.tail_dim), scores(head, row), kScoreStride);
    }
  }

  /// Turns keys over block by block; each block serves all rows.
  void score_transposed(const ChunkRows<T>& chunk, int64_t head, int row_first, int row_last) {
    const int64_t stride = call_.padded_dim + kUnpackedPad, tiles = (row_last - row_first + kPackedTile - 1) / kPackedTile;
    const TransposedKeys keys{transposed_, call_.padded_dim / Vec::kLanes};
    const ListedRows<T> listed = chunk.keys(call_, item_->head_first + head);
    for (int block = chunk.first; block < chunk.last; block += kPackedBlock) {
      const int last = std::min(block + kPackedBlock, chunk.last);
      if (call_.keys_need_unpacking()) {
        unpack_keys(chunk, head, block, last, stride);
        keys.fill(PackedRows{unpacked_ - block * stride, stride}, block, last, call_.padded_dim);
      } else {
        keys.fill(listed, block, last, call_.key_dim);
      }
      RowPrefetcher next(listed, last, kPackedBlock, call_.key_dim, tiles * (kPackedBlock / (2 * Vec::kLanes)));
      for (int row = row_first; row < row_last; row += kPackedTile) {
        const int count = std::min(kPackedTile, row_last - row);
        const auto [seen_first, seen_last] = seen_by_any(row, count, block, last);
        transposed_rows<kPackedTile>(count, query(head, row), call_.padded_dim, keys, block, static_cast<int>(seen_first),
                                     static_cast<int>(seen_last), scores(head, row), kScoreStride, next);
      }
    }
  }

  /// Key rows [first, last) as the products take them.
  void unpack_keys(const ChunkRows<T>& chunk, int64_t head, int first, int last, int64_t stride) {
    const int64_t at = item_->head_first + head;
    const ListedRows<T> keys = chunk.keys(call_, at), tails = chunk.tails(call_, at);
    for (int t = first; t < last; ++t) {
      // One row after the other: where vectors are wider than a row's end, the next row writes over what it spilled.
      float* row = unpacked_ + (t - first) * stride;
      unpack_rows(keys, t, t + 1, call_.key_dim, row, stride);
      if (call_.tail_dim > 0) unpack_rows(tails, t, t + 1, call_.tail_dim, row + call_.key_dim, stride);
      if (call_.rotation.table) rotate(call_.rotation, chunk_start_ + t, row);
    }
  }

  /// Products to weights, row by row.
  void soften(int64_t chunk, const ChunkRows<T>& here) {
    const bool scaled = call_.key_scales.start || call_.value_scales.start;
    for (int64_t head = 0; head < num_heads_; ++head) {
      if (scaled) load_scales(chunk, head, tile(0).sequence, here.first, here.last);
      int row = 0;
      for (int64_t member = 0; member < num_members(); ++member) {
        const int last = row + static_cast<int>(tile(member).rows());
        if (scaled && here.last < kChunkTokens) {
          int tail_last = here.last;
          for (int r = row; r < last; ++r) tail_last = std::max(tail_last, views_[r].last);
          load_scales(chunk, head, tile(member).sequence, here.last, tail_last);
        }
        for (; row < last; ++row) {
          const RowAt at{query_head(head, row), rows_[row].position, chunk_start_,
                         call_.key_scales.start ? key_scales_ : nullptr, call_.value_scales.start ? value_scales_ : nullptr};
          chunk_state_[head * num_rows_ + row] = softmax_(scores(head, row), call_, views_[row], at);
        }
      }
    }
  }

  void load_scales(int64_t chunk, int64_t head, int64_t sequence, int first, int last) {
    const int64_t at = item_->head_first + head;
    if (call_.key_scales.start) copy_scales(call_.key_scales, call_.batch, sequence, chunk, at, first, last, key_scales_);
    if (call_.value_scales.start)
      copy_scales(call_.value_scales, call_.batch, sequence, chunk, at, first, last, value_scales_);
  }

  /// Adds the weighted values of a chunk to rows [row_first, row_last) of every head.
  void weigh(const ChunkRows<T>& chunk, int row_first, int row_last) {
    if (!in_place(row_last - row_first)) {
      for (int64_t head = 0; head < num_heads_; ++head) weigh_unpacked(chunk, head, row_first, row_last);
      return;
    }
    RowPrefetcher none;
    for (int block = chunk.first; block < chunk.last; block += kValueBlock) {
      const int last = std::min(block + kValueBlock, chunk.last);
      for (int64_t head = 0; head < num_heads_; ++head) {
        for (int row = row_first; row < row_last; row += kDirectTile)
          weigh_rows<kDirectTile>(head, row, std::min(kDirectTile, row_last - row),
                                  chunk.values(call_, item_->head_first + head, row == row_first ? kTokensAhead : 0),
                                  block, last, none);
      }
    }
  }

  void weigh_unpacked(const ChunkRows<T>& chunk, int64_t head, int row_first, int row_last) {
    const int64_t stride = call_.padded_value_dim + kUnpackedPad, tiles = (row_last - row_first + kPackedTile - 1) / kPackedTile;
    const int64_t columns = std::max<int64_t>(1, call_.value_dim / (value_vecs(kPackedTile) * Vec::kLanes));
    const ListedRows<T> values = chunk.values(call_, item_->head_first + head);
    for (int block = chunk.first; block < chunk.last; block += kPackedBlock) {
      const int last = std::min(block + kPackedBlock, chunk.last);
      RowPrefetcher next(values, last, kPackedBlock, call_.value_dim, tiles * columns);
      unpack_rows(values, block, last, call_.value_dim, unpacked_, stride);
      const PackedRows rows{unpacked_ - block * stride, stride};
      for (int row = row_first; row < row_last; row += kPackedTile)
        weigh_rows<kPackedTile>(head, row, std::min(kPackedTile, row_last - row), rows, block, last, next);
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
  /// A value that a row does not see never meets it, so it may be NaN.
  template <int kTile, typename Rows>
  void weigh_rows(int64_t head, int row, int count, const Rows& rows, int first, int last, RowPrefetcher& next) {
    if (all_see_.first <= first && last <= all_see_.last)
      return weigh_tile<kTile>(head, row, count, rows, first, last, next);
    int common_first = first, common_last = last;
    bool masked = false;
    for (int r = row; r < row + count; ++r) {
      common_first = std::max(common_first, views_[r].first);
      common_last = std::min(common_last, views_[r].last);
    }
    for (int r = row; r < row + count && views_[r].mask && common_first < common_last; ++r)
      masked |= std::find(views_[r].mask + common_first, views_[r].mask + common_last, 0) != views_[r].mask + common_last;
    if (common_first >= common_last || masked) common_first = common_last = last;
    for (int r = row; r < row + count; ++r)
      weigh_row(head, r, rows, std::max(first, views_[r].first), std::min(common_first, views_[r].last), next);
    if (common_first >= common_last) return;
    weigh_tile<kTile>(head, row, count, rows, common_first, common_last, next);
    for (int r = row; r < row + count; ++r)
      weigh_row(head, r, rows, common_last, std::min(last, views_[r].last), next);
  }

  /// Run by run of tokens that the row sees.
  template <typename Rows>
  void weigh_row(int64_t head, int row, const Rows& rows, int first, int last, RowPrefetcher& next) {
    const uint8_t* mask = views_[row].mask;
    while (first < last) {
      int run = last;
      if (mask) {
        while (first < last && !mask[first]) ++first;
        run = first;
        while (run < last && mask[run]) ++run;
      }
      if (first < run) weigh_tile<1>(head, row, 1, rows, first, run, next);
      first = run;
    }
  }

  template <int kTile, typename Rows>
  void weigh_tile(int64_t head, int row, int count, const Rows& rows, int first, int last, RowPrefetcher& next) {
    float* totals = chunk_total_ + (head * num_rows_ + row) * call_.padded_value_dim;
    value_rows<kTile>(count, scores(head, row), kScoreStride, rows, first, last, static_cast<int>(call_.value_dim), totals,
                      call_.padded_value_dim, next);
  }

  /// Folds the chunk into the running state, or leaves it to be merged when other chunks are someone else's.
  void leave_chunk(int64_t chunk) {
    const int64_t dim = call_.padded_value_dim;
    for (int64_t head = 0; head < num_heads_; ++head) {
      int64_t row = head * num_rows_;
      for (int64_t member = 0; member < num_members(); ++member) {
        const AttentionTile& of = tile(member);
        int64_t slot = of.state < 0 ? -1 : of.state_of(call_.batch.num_kv_heads, chunk, item_->head_first + head);
        for (const int64_t last = row + of.rows(); row < last; ++row) {
          const float* chunk_total = chunk_total_ + row * dim;
          if (slot < 0) {
            fold_chunk(state_[row], total_ + row * dim, chunk_state_[row], chunk_total, dim);
          } else {
            call_.chunk_states[slot] = chunk_state_[row];
            std::copy(chunk_total, chunk_total + dim, call_.chunk_totals + slot * dim);
            ++slot;
          }
        }
      }
    }
  }

  void finish_item() {
    const int64_t dim = call_.padded_value_dim;
    for (int64_t head = 0; head < num_heads_; ++head) {
      for (int row = 0; row < num_rows_; ++row) {
        const int64_t at = head * num_rows_ + row;
        if (call_.sinks) fold_sink(state_[at], total_ + at * dim, call_.sinks[query_head(head, row)], dim);
        finish_row(call_, state_[at], total_ + at * dim, rows_[row].token, query_head(head, row));
      }
    }
  }

  const float* query(int64_t head, int row) const { return query_ + (head * num_rows_ + row) * call_.padded_dim; }
  float* scores(int64_t head, int row) const { return scores_ + (head * num_rows_ + row) * kScoreStride; }

  const Call& call_;
  const Softmax softmax_;
  const AttentionItem* item_ = nullptr;
  float *query_, *scores_, *chunk_total_, *total_, *unpacked_, *transposed_, *key_scales_, *value_scales_;
  RowState *state_, *chunk_state_;
  Row* rows_;
  RowView* views_;
  int64_t num_heads_ = 0, chunk_start_ = 0;
  int num_rows_ = 0;
  KeyRange visible_{0, 0};
  KeyRange all_see_{0, 0};  // tokens of the chunk
};

}  // namespace pagedkv
