#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

/// How one attention call is cut into items that threads take one after another. The cut decides who computes, never what.
namespace pagedkv {

/// Keys are taken in chunks of this many tokens at fixed positions of the sequence, whoever computes them.
constexpr int kChunkTokens = 256;
/// Up to this many query rows a KV head, pages are read in place and all heads of a chunk are taken together; above, values
/// are first unpacked to contiguous float32 and keys turned over.
constexpr int kDirectRows = 8;
/// Query rows that share one unpacking: whole tiles of six, and few enough that their scores stay in the second-level cache.
constexpr int kPackedRows = 192;
/// Rows a KV head up to which a sequence shares the reading of a common prefix; above, arithmetic outweighs the reading.
constexpr int kSharingRows = 64;
/// Tokens of a chunk that must be common before it is worth taking together.
constexpr int kLeastSharedTokens = 32;

/// The batch: host arrays of the plan and its numbers.
struct AttentionBatch {
  const int32_t* query_indptr;
  const int32_t* page_indptr;
  const int32_t* page_indices;
  const int32_t* seq_lens;
  int64_t num_seqs, page_size, num_q_heads, num_kv_heads, group, window_left;
  bool causal;

  int64_t query_len(int64_t sequence) const { return int64_t{query_indptr[sequence + 1]} - query_indptr[sequence]; }
};

/// Keys that a row sees: [first, last).
struct KeyRange {
  int64_t first, last;
};

/// What new token `token` of a sequence sees.
inline KeyRange visible_keys(const AttentionBatch& batch, int64_t sequence, int64_t token) {
  const int64_t kv_len = batch.seq_lens[sequence], position = kv_len - batch.query_len(sequence) + token;
  const int64_t last = std::clamp<int64_t>(batch.causal ? position + 1 : kv_len, 0, kv_len);
  const int64_t first = batch.window_left >= 0 ? std::clamp<int64_t>(position - batch.window_left, 0, last) : 0;
  return {first, last};
}

/// Rows [row_first, row_last) of one sequence over all KV heads, row = new token * group + head of the group, and the chunks
/// they see. state >= 0: the chunks are computed by several items, which leave one state a chunk, KV head and row in the
/// workspace, in this order from entry `state` on, to be merged at the end.
struct AttentionTile {
  int64_t sequence, row_first, row_last, chunk_first, chunk_last, state;

  int64_t rows() const { return row_last - row_first; }
  int64_t state_of(int64_t num_kv_heads, int64_t chunk, int64_t head) const {
    return state + ((chunk - chunk_first) * num_kv_heads + head) * rows();
  }
};

/// Tiles `members` [member_first, member_last) x KV heads [head_first, head_last) x chunks [chunk_first, chunk_last). The pages of
/// all members agree in these chunks, but in the last one only for its first `shared_tokens` tokens.
struct AttentionItem {
  int64_t member_first, member_last, head_first, head_last, chunk_first, chunk_last, shared_tokens;
};

/// The cut as plain arrays, views of one int64 buffer.
struct AttentionWork {
  int64_t num_states, most_rows;  // most_rows: of one item over its heads
  const AttentionTile* tiles;
  int64_t num_tiles;
  const AttentionItem* items;  // dearest first
  int64_t num_items;
  const int64_t* members;
  int64_t num_members;

  /// Reads what `divide_attention` wrote. Throws ValueError when the buffer does not fit the batch: whatever became of it,
  /// no address outside the tensors follows from it.
  static AttentionWork read(const int64_t* buffer, int64_t length, const AttentionBatch& batch);
};

/// Cuts a checked batch so that `num_threads` finish together; every chunk that several sequences have in common is one item for
/// all of them.
std::vector<int64_t> divide_attention(const AttentionBatch& batch, int64_t num_threads);

}  // namespace pagedkv
