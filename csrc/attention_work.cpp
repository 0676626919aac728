#include "attention_work.h"

#include "shared_prefix.h"

#include <tvm/ffi/error.h>

#include <utility>

namespace pagedkv {
namespace {

/// Results of this many chunks and rows wait at most because their chunks are shared: 256 MiB with 128 columns.
constexpr int64_t kMostSharedStates = int64_t{1} << 19;
constexpr int64_t kMostRows = int64_t{1} << 31;

/// An item before it is written out, and what it costs.
struct Draft {
  std::vector<int32_t> members;
  int64_t head_first, head_last, chunk_first, chunk_last, shared_tokens;
  int64_t rows;  // a head
  double cost;
};

/// In multiply-adds of one column; reading a key costs about as much as eight rows of arithmetic.
double cost_of(int64_t tokens, int64_t rows, int64_t heads) { return static_cast<double>(tokens * (rows + 8) * heads); }

/// Chunks that hold a key which some row of the tile sees.
void set_chunks(const AttentionBatch& batch, AttentionTile& tile) {
  const KeyRange earliest = visible_keys(batch, tile.sequence, tile.row_first / batch.group);
  const KeyRange latest = visible_keys(batch, tile.sequence, (tile.row_last - 1) / batch.group);
  if (latest.first >= latest.last) {
    tile.state = 0;  // merged from nothing: exactly zero
    return;
  }
  tile.chunk_first = earliest.first / kChunkTokens;
  tile.chunk_last = (latest.last + kChunkTokens - 1) / kChunkTokens;
}

std::vector<AttentionTile> cut_rows(const AttentionBatch& batch) {
  std::vector<AttentionTile> tiles;
  tiles.reserve(batch.num_seqs);
  const int64_t rows = batch.query_indptr[batch.num_seqs] * batch.group;
  if (rows > kMostRows)
    TVM_FFI_THROW(ValueError) << "query rows a KV head must be at most " << kMostRows << " (new tokens times query heads a KV head), got "
                              << rows << ".";
  // Whole tokens, so that the rows of a tile see nearly the same keys, unless one token alone has too many rows.
  const int64_t step = batch.group <= kPackedRows ? kPackedRows / batch.group * batch.group : kPackedRows;
  for (int64_t sequence = 0; sequence < batch.num_seqs; ++sequence) {
    const int64_t rows = batch.query_len(sequence) * batch.group;
    for (int64_t row = 0; row < rows; row += step) {
      tiles.push_back({sequence, row, std::min(row + step, rows), 0, 0, -1});
      set_chunks(batch, tiles.back());
    }
  }
  return tiles;
}

class Division {
 public:
  Division(const AttentionBatch& batch, int64_t num_threads)
      : batch_(batch), num_threads_(num_threads), tiles_(cut_rows(batch)), shared_(tiles_.size(), {-1, -1}) {
    direct_heads_ = heads_of_direct_items();
    for (const SharedChunks& group : find_shared_chunks(batch, tiles_)) take_shared(group);
    for (size_t tile = 0; tile < tiles_.size(); ++tile) take_rest(static_cast<int32_t>(tile));
    split_dear_ones();
    std::stable_sort(drafts_.begin(), drafts_.end(), [](const Draft& a, const Draft& b) { return a.cost > b.cost; });
  }

  std::vector<int64_t> written() {
    int64_t num_states = 0, most_rows = 0, num_members = 0;
    for (AttentionTile& tile : tiles_) {
      if (tile.state < 0) continue;
      tile.state = num_states;
      num_states += (tile.chunk_last - tile.chunk_first) * batch_.num_kv_heads * tile.rows();
    }
    for (const Draft& draft : drafts_) {
      most_rows = std::max(most_rows, draft.rows * (draft.head_last - draft.head_first));
      num_members += static_cast<int64_t>(draft.members.size());
    }
    std::vector<int64_t> buffer{num_states, most_rows, static_cast<int64_t>(tiles_.size()),
                                static_cast<int64_t>(drafts_.size()), num_members};
    buffer.reserve(5 + 6 * tiles_.size() + 7 * drafts_.size() + num_members);
    for (const AttentionTile& tile : tiles_)
      buffer.insert(buffer.end(), {tile.sequence, tile.row_first, tile.row_last, tile.chunk_first, tile.chunk_last, tile.state});
    int64_t member = 0;
    for (const Draft& draft : drafts_) {
      const int64_t end = member + static_cast<int64_t>(draft.members.size());
      buffer.insert(buffer.end(), {member, end, draft.head_first, draft.head_last, draft.chunk_first, draft.chunk_last,
                                   draft.shared_tokens});
      member = end;
    }
    for (const Draft& draft : drafts_) buffer.insert(buffer.end(), draft.members.begin(), draft.members.end());
    return buffer;
  }

 private:
  /// Heads that one item of few rows takes together: all, unless that leaves threads without work.
  int64_t heads_of_direct_items() const {
    int64_t chunks = 0;
    for (const AttentionTile& tile : tiles_) chunks += tile.chunk_last - tile.chunk_first;
    int64_t heads = std::min<int64_t>(batch_.num_kv_heads, 64);
    while (heads > 1 && chunks * ((batch_.num_kv_heads + heads - 1) / heads) < 2 * num_threads_) heads = (heads + 1) / 2;
    return heads;
  }

  /// Items of the same chunks for all heads; many rows take one head at a time.
  void add(std::vector<int32_t> members, int64_t rows, int64_t chunk_first, int64_t chunk_last, int64_t shared_tokens,
           int64_t tokens, int64_t own_tokens) {
    const int64_t step = rows > kDirectRows ? 1 : std::clamp<int64_t>(64 / std::max<int64_t>(1, rows), 1, direct_heads_);
    const int64_t own_rows = rows / static_cast<int64_t>(members.size());
    for (int64_t head = 0; head < batch_.num_kv_heads; head += step) {
      const int64_t head_last = std::min(head + step, batch_.num_kv_heads);
      const double cost = cost_of(tokens, rows, head_last - head) + cost_of(own_tokens, own_rows, head_last - head);
      drafts_.push_back({members, head, head_last, chunk_first, chunk_last, shared_tokens, rows, cost});
    }
  }

  /// Tiles that share take room for the results of all their chunks; beyond a limit they read for themselves.
  bool has_room(AttentionTile& tile) {
    if (tile.state >= 0) return true;
    const int64_t states = (tile.chunk_last - tile.chunk_first) * batch_.num_kv_heads * tile.rows();
    if (shared_states_ + states > kMostSharedStates) return false;
    shared_states_ += states;
    tile.state = 0;
    return true;
  }

  void take_shared(const SharedChunks& group) {
    for (size_t next = 0; next < group.tiles.size();) {
      std::vector<int32_t> members;
      int64_t rows = 0, own_tokens = 0;
      for (; next < group.tiles.size() && rows + tiles_[group.tiles[next]].rows() <= kPackedRows; ++next) {
        AttentionTile& tile = tiles_[group.tiles[next]];
        if (!has_room(tile)) continue;
        members.push_back(group.tiles[next]);
        rows += tile.rows();
        const int64_t left = batch_.seq_lens[tile.sequence] - (group.chunk_last - 1) * kChunkTokens - group.shared_tokens;
        own_tokens += std::clamp<int64_t>(left, 0, kChunkTokens - group.shared_tokens);
      }
      if (members.size() < 2) continue;
      for (const int32_t member : members) {
        KeyRange& range = shared_[member];
        if (range.first < 0) range.first = group.chunk_first;
        range.last = group.chunk_last;
      }
      const int64_t tokens = (group.chunk_last - group.chunk_first - 1) * kChunkTokens + group.shared_tokens;
      add(std::move(members), rows, group.chunk_first, group.chunk_last, group.shared_tokens, tokens, own_tokens);
    }
  }

  /// What of a tile no other sequence shares.
  void take_rest(int32_t number) {
    const AttentionTile& tile = tiles_[number];
    const KeyRange shared = shared_[number].first < 0 ? KeyRange{tile.chunk_last, tile.chunk_last} : shared_[number];
    for (const KeyRange chunks : {KeyRange{tile.chunk_first, shared.first}, KeyRange{shared.last, tile.chunk_last}}) {
      const int64_t tokens = (chunks.last - chunks.first) * kChunkTokens;
      if (tokens > 0) add({number}, tile.rows(), chunks.first, chunks.last, kChunkTokens, tokens, 0);
    }
  }

  /// Cuts items between chunks until none is dear enough to keep the other threads waiting.
  void split_dear_ones() {
    double total = 0;
    for (const Draft& draft : drafts_) total += draft.cost;
    const double limit = total / static_cast<double>(4 * num_threads_);
    std::vector<Draft> whole;
    whole.swap(drafts_);
    for (Draft& draft : whole) {
      const int64_t chunks = draft.chunk_last - draft.chunk_first;
      // A tenth above the limit is not worth the states that a split writes.
      const int64_t parts = num_threads_ == 1 ? 1 : std::min(chunks, static_cast<int64_t>(draft.cost / limit + 0.9));
      if (parts <= 1) {
        drafts_.push_back(std::move(draft));
        continue;
      }
      for (const int32_t tile : draft.members) tiles_[tile].state = 0;
      for (int64_t part = 0; part < parts; ++part) {
        Draft item = draft;
        item.chunk_first = draft.chunk_first + chunks * part / parts;
        item.chunk_last = draft.chunk_first + chunks * (part + 1) / parts;
        item.cost = draft.cost * static_cast<double>(item.chunk_last - item.chunk_first) / static_cast<double>(chunks);
        if (part + 1 < parts) item.shared_tokens = kChunkTokens;
        drafts_.push_back(std::move(item));
      }
    }
  }

  const AttentionBatch& batch_;
  const int64_t num_threads_;
  std::vector<AttentionTile> tiles_;
  std::vector<KeyRange> shared_;  // of each tile: the chunks it shares, {-1, -1} for none
  std::vector<Draft> drafts_;
  int64_t direct_heads_, shared_states_ = 0;
};

}  // namespace

std::vector<int64_t> divide_attention(const AttentionBatch& batch, int64_t num_threads) {
  return Division(batch, num_threads).written();
}

AttentionWork AttentionWork::read(const int64_t* buffer, int64_t length, const AttentionBatch& batch) {
  const auto check = [](bool holds, const char* what) {
    if (!holds)
      TVM_FFI_THROW(ValueError) << "the plan must be as plan_attention made it, got work with " << what
                                << ". Its arrays were changed, or it was made by hand.";
  };
  const auto within = [](int64_t first, int64_t last, int64_t least, int64_t most) {
    return least <= first && first <= last && last <= most;
  };
  check(length >= 5, "no header");
  const int64_t num_tiles = buffer[2], num_items = buffer[3], num_members = buffer[4];
  check(within(0, num_tiles, 0, length) && within(0, num_items, 0, length) && within(0, num_members, 0, length) &&
            length == 5 + 6 * num_tiles + 7 * num_items + num_members,
        "another length");
  const auto* tiles = reinterpret_cast<const AttentionTile*>(buffer + 5);
  const auto* items = reinterpret_cast<const AttentionItem*>(tiles + num_tiles);
  const auto* members = reinterpret_cast<const int64_t*>(items + num_items);
  const AttentionWork work{buffer[0], buffer[1], tiles, num_tiles, items, num_items, members, num_members};
  int64_t num_states = 0, most_rows = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const AttentionTile& tile = tiles[i];
    check(tile.sequence >= 0 && tile.sequence < batch.num_seqs, "a sequence that is not there");
    check(within(tile.row_first, tile.row_last, 0, batch.query_len(tile.sequence) * batch.group) && tile.rows() > 0 &&
              tile.rows() <= kPackedRows,
          "rows that are not there");
    const int64_t chunks = (int64_t{batch.seq_lens[tile.sequence]} + kChunkTokens - 1) / kChunkTokens;
    check(within(tile.chunk_first, tile.chunk_last, 0, chunks), "chunks that are not there");
    check(tile.state == -1 || tile.state == num_states, "states outside the workspace");
    if (tile.state >= 0) num_states += (tile.chunk_last - tile.chunk_first) * batch.num_kv_heads * tile.rows();
  }
  for (int64_t i = 0; i < num_items; ++i) {
    const AttentionItem& item = items[i];
    check(within(item.member_first, item.member_last, 0, num_members) && item.member_first < item.member_last,
          "members that are not there");
    check(within(item.head_first, item.head_last, 0, batch.num_kv_heads) && item.head_first < item.head_last,
          "heads that are not there");
    check(within(0, item.shared_tokens, 0, kChunkTokens), "more tokens than a chunk has");
    int64_t rows = 0;
    for (int64_t j = item.member_first; j < item.member_last; ++j) {
      check(members[j] >= 0 && members[j] < num_tiles, "a tile that is not there");
      const AttentionTile& tile = tiles[members[j]];
      check(within(item.chunk_first, item.chunk_last, tile.chunk_first, tile.chunk_last), "chunks outside a tile");
      check(tile.state >= 0 || (item.chunk_first == tile.chunk_first && item.chunk_last == tile.chunk_last &&
                                item.member_last == item.member_first + 1),
            "a result that nobody merges");
      rows += tile.rows();
    }
    most_rows = std::max(most_rows, rows * (item.head_last - item.head_first));
  }
  check(num_states == work.num_states && most_rows == work.most_rows, "a header of other work");
  return work;
}

}  // namespace pagedkv
