#include "attention_work.h"

#include <algorithm>

namespace pagedkv {
namespace {

/// Chunks that hold a key which some row of the tile sees.
KeyRange visible_chunks(const AttentionBatch& batch, int32_t sequence, int64_t token_first, int64_t token_last) {
  const int64_t kv_len = batch.seq_lens[sequence];
  const int64_t q_len = batch.query_indptr[sequence + 1] - batch.query_indptr[sequence];
  const KeyRange earliest = visible_keys(batch, kv_len, q_len, token_first);
  const KeyRange latest = visible_keys(batch, kv_len, q_len, token_last - 1);
  if (latest.first >= latest.last) return {0, 0};
  return {earliest.first / kChunkTokens, (latest.last + kChunkTokens - 1) / kChunkTokens};
}

/// In multiply-adds of one column; reading a key costs about as much as eight rows of arithmetic.
double chunk_cost(int64_t rows, int64_t heads) { return static_cast<double>(heads * (rows + 8) * kChunkTokens); }

/// Heads that one item takes together: all, unless that leaves threads without work or the rows' scratch outgrows the cache.
int64_t heads_an_item(const AttentionBatch& batch, int64_t num_threads) {
  int64_t chunks = 0;
  for (int64_t s = 0; s < batch.num_seqs; ++s) chunks += (batch.seq_lens[s] + kChunkTokens - 1) / kChunkTokens;
  int64_t heads = std::min<int64_t>(batch.num_kv_heads, 64);
  while (heads > 1 && chunks * ((batch.num_kv_heads + heads - 1) / heads) < 2 * num_threads) heads = (heads + 1) / 2;
  return heads;
}

std::vector<AttentionItem> tiles(const AttentionBatch& batch, int64_t num_threads) {
  std::vector<AttentionItem> result;
  const int64_t direct_heads = heads_an_item(batch, num_threads);
  for (int32_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t q_len = batch.query_indptr[s + 1] - batch.query_indptr[s];
    const bool direct = q_len * batch.group <= kDirectRows;
    const int64_t step = direct ? std::max<int64_t>(q_len, 1) : std::max<int64_t>(1, kPackedRows / batch.group);
    const int64_t heads =
        direct ? std::max<int64_t>(1, std::min(direct_heads, 64 / std::max<int64_t>(1, q_len * batch.group))) : 1;
    for (int64_t token = 0; token < q_len; token += step) {
      const int64_t token_last = std::min(token + step, q_len);
      const KeyRange chunks = visible_chunks(batch, s, token, token_last);
      for (int64_t head = 0; head < batch.num_kv_heads; head += heads) {
        const int64_t head_last = std::min(head + heads, batch.num_kv_heads);
        const double cost = static_cast<double>(chunks.last - chunks.first) *
                            chunk_cost((token_last - token) * batch.group, head_last - head);
        result.push_back({s, static_cast<int32_t>(token), static_cast<int32_t>(token_last), static_cast<int32_t>(head),
                          static_cast<int32_t>(head_last), static_cast<int32_t>(chunks.first),
                          static_cast<int32_t>(chunks.last), -1, cost});
      }
    }
  }
  return result;
}

}  // namespace

AttentionWork divide_attention(const AttentionBatch& batch, int64_t num_threads) {
  AttentionWork work;
  double total = 0;
  const std::vector<AttentionItem> whole = tiles(batch, num_threads);
  for (const AttentionItem& tile : whole) total += tile.cost;
  const double limit = total / static_cast<double>(4 * num_threads);
  for (const AttentionItem& tile : whole) {
    const int64_t rows = int64_t{tile.token_last - tile.token_first} * batch.group * (tile.head_last - tile.head_first);
    work.most_rows = std::max(work.most_rows, rows);
    const int64_t chunks = tile.chunk_last - tile.chunk_first;
    // A tenth above the limit is not worth the states that a split writes.
    const int64_t parts = chunks > 1 ? std::min(chunks, static_cast<int64_t>(tile.cost / limit + 0.9)) : 1;
    if (num_threads == 1 || parts <= 1) {
      work.items.push_back(tile);
      continue;
    }
    work.splits.push_back({tile, rows});
    work.splits.back().tile.state = work.num_states;
    for (int64_t part = 0; part < parts; ++part) {
      AttentionItem item = tile;
      item.chunk_first = static_cast<int32_t>(tile.chunk_first + chunks * part / parts);
      item.chunk_last = static_cast<int32_t>(tile.chunk_first + chunks * (part + 1) / parts);
      item.state = work.num_states + (item.chunk_first - tile.chunk_first) * rows;
      item.cost = tile.cost * (item.chunk_last - item.chunk_first) / static_cast<double>(chunks);
      work.items.push_back(item);
    }
    work.num_states += chunks * rows;
  }
  std::stable_sort(work.items.begin(), work.items.end(),
                   [](const AttentionItem& a, const AttentionItem& b) { return a.cost > b.cost; });
  return work;
}

}  // namespace pagedkv
