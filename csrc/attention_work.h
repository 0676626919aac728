#pragma once

#include <cstdint>
#include <vector>

/// How one attention call is cut into items that threads take one after another.
namespace pagedkv {

/// Keys are taken in chunks of this many tokens at fixed positions of the sequence, whoever computes them.
constexpr int kChunkTokens = 256;
/// Up to this many query rows a KV head, pages are read in place and all heads of a chunk are taken together; above, keys
/// and values are first unpacked to contiguous float32.
constexpr int kDirectRows = 8;
/// Query rows that share one unpacking. More rows would push the scores out of the second-level cache.
constexpr int kPackedRows = 128;

/// The batch: host arrays of the plan and its numbers.
struct AttentionBatch {
  const int32_t* query_indptr;
  const int32_t* page_indptr;
  const int32_t* page_indices;
  const int32_t* seq_lens;
  int64_t num_seqs, page_size, num_q_heads, num_kv_heads, group, head_dim, value_dim, window_left;
  bool causal;
};

/// Keys that a row sees: [first, last).
struct KeyRange {
  int64_t first, last;
};

/// What row `token` (of q_len) of a sequence sees.
inline KeyRange visible_keys(const AttentionBatch& batch, int64_t kv_len, int64_t q_len, int64_t token) {
  const int64_t position = kv_len - q_len + token;
  int64_t last = batch.causal ? position + 1 : kv_len;
  int64_t first = batch.window_left >= 0 ? position - batch.window_left : 0;
  last = last < 0 ? 0 : (last > kv_len ? kv_len : last);
  first = first < 0 ? 0 : (first > last ? last : first);
  return {first, last};
}

/// Query tokens [token_first, token_last) of one sequence x KV heads [head_first, head_last) x chunks [chunk_first, chunk_last).
/// state >= 0: the item leaves one state a chunk and row in the workspace, from that row on, in place of the result.
struct AttentionItem {
  int32_t sequence, token_first, token_last, head_first, head_last, chunk_first, chunk_last;
  int64_t state;
  double cost;
};

/// A tile whose chunks went to several items: row r of chunk c is at state + (c - chunk_first) * rows + r.
struct SplitTile {
  AttentionItem tile;
  int64_t rows;
};

struct AttentionWork {
  std::vector<AttentionItem> items;  // dearest first
  std::vector<SplitTile> splits;
  int64_t num_states = 0;
  int64_t most_rows = 0;  // query rows of the largest item
};

/// Cuts the batch so that `num_threads` finish together. The cut changes who computes, never what.
AttentionWork divide_attention(const AttentionBatch& batch, int64_t num_threads);

}  // namespace pagedkv
