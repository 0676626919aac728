#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "radix_tree_queue.h"
#include "radix_tree_table.h"
#include "radix_tree_tokens.h"

namespace pagedkv {

/// What goes first. The Python classes of the same names say what each means; kLongRank asks a function.
enum class EvictionOrder { kLRU, kLFU, kFIFO, kMRU, kFILO, kSLRU, kPriority, kLongRank };

/// A run of pages below its parent; a root has no pages and no parent.
struct RadixTreeNode {
  PageRun run;
  int32_t parent = -1;  // of a node that is not in use: the next one that is not, or -1
  int32_t num_before = 0;  // pages of the nodes above it
  int32_t num_children = 0;
  int32_t locks = 0;    // handles that protect this node, because they name it or a node below it
  int32_t anchors = 0;  // handles that name this node itself
  uint32_t hash = 0;    // of its parent and first page: where the table has it
  bool is_used = false;
  int64_t version = 0;  // rises when pages leave the node, so never while it is locked; never falls, whoever uses the node
  int64_t created = 0, last_access = 0, num_hits = 0, priority = 0;
};

/// What a handle says: a node, which only counts while its version is the same, and where in the run that ends with it.
struct RadixTreeHandle {
  int64_t node, version, num_tokens;
};

/// What an insert did.
struct RadixTreeGrowth {
  RadixTreeHandle handle;
  int64_t num_cached_pages;
  int64_t parent_page;  // the page that the new ones continue, -1 for none
  int64_t root;
};

/// Which pages hold the keys and values of which tokens; python_radix_tree.py is the same in words. Every call throws before it
/// changes anything, and takes any numbers for a handle or a root. Not for two threads at once.
class RadixTree {
 public:
  /// The rank of a run for kLongRank: (num_pages, created, last_access, num_hits, priority). Must not throw; gives nothing when
  /// there is no answer, and is asked again when it is the turn of this run, which is at once.
  using LongRank = std::function<std::vector<double>(int64_t, int64_t, int64_t, int64_t, int64_t)>;

  /// Versions of nodes begin at `first_version`, so that those of two trees differ.
  RadixTree(int64_t page_size, EvictionOrder order, LongRank long_rank, int64_t first_version);

  int64_t page_size() const { return page_size_; }
  int64_t num_cached() const { return num_cached_; }
  int64_t num_evictable() const { return num_evictable_; }
  int64_t num_bytes() const;

  int32_t add_root();
  void drop_root(int64_t root);
  /// A root without nodes, or -1.
  int64_t empty_root() const { return empty_roots_.empty() ? -1 : empty_roots_.back(); }

  /// Writes the pages of the longest cached prefix; `root` is -1 for an unknown namespace.
  RadixTreeHandle match(int64_t root, TokenSpan ids, int32_t* pages);
  RadixTreeGrowth insert(int64_t root, TokenSpan ids, const int32_t* pages, bool only_new, int64_t priority);
  RadixTreeGrowth extend(RadixTreeHandle handle, TokenSpan ids, const int32_t* pages, bool only_new, int64_t priority);
  /// Whether the prefix ends with its node, and tokens behind it would only lengthen that: a leaf that is locked once.
  bool ends_growing_leaf(RadixTreeHandle handle) const;
  /// Protects the node that the handle says and all above it: also what the node grew by behind the handle's end.
  void lock(RadixTreeHandle handle);
  void unlock(RadixTreeHandle handle);
  RadixTreeHandle ancestor(RadixTreeHandle handle, int64_t num_tokens);
  /// Writes the tokens from `start` on, where there is `room` for so many.
  void copy_tokens(RadixTreeHandle handle, int64_t start, int64_t* tokens, int64_t room) const;
  /// Stops early when there is no answer for the rank of the next run.
  int64_t evict(int64_t num_pages, int32_t* pages);
  bool holds(int64_t page) const;
  /// Writes all pages, the least first.
  void held_pages(int32_t* pages) const;

  /// For inspection: every node in use, roots with nodes included.
  std::vector<int32_t> nodes() const;
  const RadixTreeNode& node(int64_t id) const;
  int64_t queued_serial(int32_t id) const { return queue_.serial(id); }
  /// What is wrong with the table or the queue, or nothing.
  std::string defect() const;

 private:
  static constexpr int64_t kChunkBits = 6;

  RadixTreeNode& at(int64_t id) { return chunks_[id >> kChunkBits][id & ((1 << kChunkBits) - 1)]; }
  const RadixTreeNode& at(int64_t id) const { return chunks_[id >> kChunkBits][id & ((1 << kChunkBits) - 1)]; }
  bool is_evictable(int32_t id) const;
  int32_t new_node(int32_t parent);
  void free_node(int32_t id);
  template <typename T>
  uint32_t child_hash(int32_t parent, const T* first_page) const;
  template <typename T>
  void find(int32_t start, int64_t num_before, const T* ids, int64_t num_pages);
  template <typename T>
  int64_t count_equal_pages(int32_t id, int64_t first_page, const T* ids, int64_t num_pages) const;
  int32_t use_path(int32_t start, int64_t num_hits);
  template <typename T>
  RadixTreeGrowth insert_below(int32_t start, int64_t start_tokens, const T* ids, int64_t num_pages, const int32_t* pages,
                               bool only_new, int64_t priority);
  int32_t split(int32_t id, int64_t num_pages);
  void refresh(int32_t id);
  void detach(int32_t id);
  void hold(const int32_t* pages, int64_t count);
  bool is_root(int64_t id) const;
  bool is_current(RadixTreeHandle handle) const;
  void check_current(RadixTreeHandle handle) const;
  int32_t end_of(int32_t id, int64_t num_tokens) const;

  const int64_t page_size_;
  const EvictionOrder order_;
  const LongRank long_rank_;
  const int64_t first_version_;
  uint64_t seed_;
  // In chunks, so that nodes stay where they are and growing copies none.
  std::vector<std::unique_ptr<RadixTreeNode[]>> chunks_;
  int32_t num_made_ = 0, first_unused_ = -1;
  NodeTable table_;
  LeafQueue queue_;
  std::vector<int32_t> empty_roots_;
  std::vector<uint64_t> held_;  // a bit a page, up to the largest page seen
  int64_t num_cached_ = 0, num_evictable_ = 0, time_ = 0;
  // The last walk: the nodes it passed, the pages that agreed, and how many of those are of the last node.
  std::vector<int32_t> path_;
  int64_t num_found_ = 0, num_found_in_last_ = 0;
};

}  // namespace pagedkv
