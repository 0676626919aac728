#include "shared_prefix.h"

#include <algorithm>

namespace pagedkv {
namespace {

/// Deeper branchings are not looked for: a chain of forks of forks would make the search quadratic.
constexpr int kMostLevels = 16;

/// A node of the tree of common pages: its tiles agree in tokens [0, end), and in no more.
struct Node {
  std::vector<int32_t> tiles;
  std::vector<Node> children;  // of two tiles or more
  int64_t end;
};

class SharingTree {
 public:
  SharingTree(const AttentionBatch& batch, const std::vector<AttentionTile>& tiles, std::vector<SharedChunks>& result)
      : batch_(batch), tiles_(tiles), result_(result) {}

  /// Groups of two members or more whose page number `depth` is the same one.
  std::vector<Node> split(const std::vector<int32_t>& members, int64_t depth, int level) const {
    std::vector<Node> nodes;
    std::vector<int64_t> by_page;
    by_page.reserve(members.size());
    for (const int32_t tile : members)
      if (depth < num_pages(tile)) by_page.push_back(int64_t{pages_of(tile)[depth]} << 32 | tile);
    std::sort(by_page.begin(), by_page.end());
    for (size_t first = 0, last; first < by_page.size(); first = last) {
      for (last = first + 1; last < by_page.size() && by_page[last] >> 32 == by_page[first] >> 32;) ++last;
      if (last - first < 2) continue;
      std::vector<int32_t> same;
      for (size_t i = first; i < last; ++i) same.push_back(static_cast<int32_t>(by_page[i]));
      nodes.push_back(grow(std::move(same), depth, level));
    }
    return nodes;
  }

  /// Names the chunks that the tiles of `node` share; those before `chunk` are named already.
  void take(const Node& node, int64_t chunk) {
    for (const int32_t tile : node.tiles) chunk = std::max(chunk, tiles_[tile].chunk_first);
    int64_t seen = node.end / kChunkTokens;
    for (const int32_t tile : node.tiles) seen = std::min(seen, tiles_[tile].chunk_last);
    if (chunk < seen) result_.push_back({node.tiles, chunk, seen, kChunkTokens});
    chunk = std::max(chunk, seen);
    if (chunk == node.end / kChunkTokens && take_last(node, chunk)) ++chunk;
    for (const Node& child : node.children) take(child, chunk);
  }

 private:
  Node grow(std::vector<int32_t> members, int64_t depth, int level) const {
    const int32_t* pages = pages_of(members[0]);
    int64_t common = num_pages(members[0]);
    for (size_t i = 1; i < members.size(); ++i) {
      const int32_t* other = pages_of(members[i]);
      const int64_t most = std::min(common, num_pages(members[i]));
      for (common = depth; common < most && pages[common] == other[common];) ++common;
    }
    Node node{std::move(members), {}, common * batch_.page_size};
    if (level + 1 < kMostLevels) node.children = split(node.tiles, common, level + 1);
    return node;
  }

  /// The chunk in which the node ends: together here, or in smaller groups that share more of it further down.
  bool take_last(const Node& node, int64_t chunk) {
    const int64_t common = node.end - chunk * kChunkTokens;
    if (common < kLeastSharedTokens || read_together(node, chunk) > read_apart(node, chunk)) return false;
    for (const int32_t tile : node.tiles)
      if (chunk < tiles_[tile].chunk_first || chunk >= tiles_[tile].chunk_last) return false;
    result_.push_back({node.tiles, chunk, chunk + 1, common});
    return true;
  }

  int64_t tokens_in(int32_t tile, int64_t chunk) const {
    return std::min<int64_t>(batch_.seq_lens[tiles_[tile].sequence] - chunk * kChunkTokens, kChunkTokens);
  }

  /// Tokens read when the node's tiles take this chunk together, and when its children do.
  int64_t read_together(const Node& node, int64_t chunk) const {
    const int64_t common = std::min<int64_t>(node.end - chunk * kChunkTokens, kChunkTokens);
    int64_t read = common;
    for (const int32_t tile : node.tiles) read += std::max<int64_t>(0, tokens_in(tile, chunk) - common);
    return read;
  }
  int64_t read_apart(const Node& node, int64_t chunk) const {
    int64_t read = 0;
    for (const int32_t tile : node.tiles) read += tokens_in(tile, chunk);
    for (const Node& child : node.children) {
      for (const int32_t tile : child.tiles) read -= tokens_in(tile, chunk);
      const bool ends_here = child.end < (chunk + 1) * kChunkTokens;
      const int64_t together = read_together(child, chunk);
      read += ends_here ? std::min(together, read_apart(child, chunk)) : together;
    }
    return read;
  }

  const int32_t* pages_of(int32_t tile) const {
    return batch_.page_indices + batch_.page_indptr[tiles_[tile].sequence];
  }
  int64_t num_pages(int32_t tile) const {
    return (batch_.seq_lens[tiles_[tile].sequence] + batch_.page_size - 1) / batch_.page_size;
  }

  const AttentionBatch& batch_;
  const std::vector<AttentionTile>& tiles_;
  std::vector<SharedChunks>& result_;
};

}  // namespace

std::vector<SharedChunks> find_shared_chunks(const AttentionBatch& batch, const std::vector<AttentionTile>& tiles) {
  std::vector<SharedChunks> result;
  std::vector<int32_t> sharing;
  for (size_t tile = 0; tile < tiles.size(); ++tile) {
    const bool whole = tiles[tile].rows() == batch.query_len(tiles[tile].sequence) * batch.group;
    if (whole && tiles[tile].rows() <= kSharingRows && tiles[tile].chunk_first < tiles[tile].chunk_last)
      sharing.push_back(static_cast<int32_t>(tile));
  }
  if (sharing.size() < 2) return result;
  SharingTree tree(batch, tiles, result);
  for (const Node& node : tree.split(sharing, 0, 0)) tree.take(node, 0);
  return result;
}

}  // namespace pagedkv
