#include "radix_tree.h"

#include <tvm/ffi/error.h>

#include <algorithm>
#include <random>

namespace pagedkv {

RadixTree::RadixTree(int64_t page_size, EvictionOrder order, LongRank long_rank, int64_t first_version)
    : page_size_(page_size),
      order_(order),
      long_rank_(std::move(long_rank)),
      first_version_(first_version),
      queue_(order == EvictionOrder::kLongRank) {
  // Nobody can prepare prompts that all fall into one place of the table.
  std::random_device device;
  seed_ = static_cast<uint64_t>(device()) << 32 | device();
}

int64_t RadixTree::num_bytes() const {
  int64_t total = static_cast<int64_t>(chunks_.size() * sizeof(RadixTreeNode)) << kChunkBits;
  for (int32_t id : nodes()) total += at(id).run.num_bytes(page_size_);
  return total + table_.num_bytes() + queue_.num_bytes() + static_cast<int64_t>(held_.capacity() * 8);
}

int32_t RadixTree::add_root() {
  empty_roots_.push_back(new_node(-1));
  return empty_roots_.back();
}

void RadixTree::drop_root(int64_t root) {
  const auto place = std::find(empty_roots_.begin(), empty_roots_.end(), root);
  if (place == empty_roots_.end()) TVM_FFI_THROW(ValueError) << "root must be one without nodes, got " << root << ".";
  empty_roots_.erase(place);
  free_node(static_cast<int32_t>(root));
}

RadixTreeHandle RadixTree::match(int64_t root, TokenSpan ids, int32_t* pages) {
  if (!is_root(root)) {
    ++time_;
    return {-1, 0, 0};
  }
  const auto start = static_cast<int32_t>(root);
  with_tokens(ids.start, ids.is_wide, [&](const auto* tokens) { find(start, 0, tokens, ids.count / page_size_); });
  const int32_t end = use_path(start, 1);
  for (int32_t id : path_) {
    const PageRun& run = at(id).run;
    pages = std::copy(run.pages(), run.pages() + run.num_pages(), pages);
  }
  refresh(end);
  return {end, at(end).version, num_found_ * page_size_};
}

RadixTreeGrowth RadixTree::insert(int64_t root, TokenSpan ids, const int32_t* pages, bool only_new, int64_t priority) {
  if (!is_root(root)) TVM_FFI_THROW(ValueError) << "root must be one of the tree, got " << root << ".";
  RadixTreeGrowth growth = with_tokens(ids.start, ids.is_wide, [&](const auto* tokens) {
    return insert_below(static_cast<int32_t>(root), 0, tokens, ids.count / page_size_, pages, only_new, priority);
  });
  growth.root = root;
  return growth;
}

RadixTreeGrowth RadixTree::extend(RadixTreeHandle handle, TokenSpan ids, const int32_t* pages, bool only_new,
                                  int64_t priority) {
  check_current(handle);
  const int32_t start = end_of(static_cast<int32_t>(handle.node), handle.num_tokens);
  RadixTreeGrowth growth = with_tokens(ids.start, ids.is_wide, [&](const auto* tokens) {
    return insert_below(start, handle.num_tokens, tokens, ids.count / page_size_, pages, only_new, priority);
  });
  // A walk that began inside a node may have split it.
  for (int32_t id = end_of(start, handle.num_tokens); id >= 0; id = at(id).parent) {
    at(id).last_access = time_;
    at(id).priority = std::max(at(id).priority, priority);
    growth.root = id;
  }
  refresh(start);
  return growth;
}

bool RadixTree::ends_growing_leaf(RadixTreeHandle handle) const {
  if (!is_current(handle)) return false;
  const RadixTreeNode& node = at(handle.node);
  return node.parent >= 0 && node.num_children == 0 && node.anchors == 1 &&
         handle.num_tokens / page_size_ == node.num_before + node.run.num_pages();
}

void RadixTree::lock(RadixTreeHandle handle) {
  check_current(handle);
  const int32_t named = static_cast<int32_t>(handle.node);
  ++at(named).anchors;
  for (int32_t id = named; at(id).parent >= 0; id = at(id).parent) {
    if (at(id).locks++ == 0) num_evictable_ -= at(id).run.num_pages();
  }
  refresh(named);
}

void RadixTree::unlock(RadixTreeHandle handle) {
  const int32_t named = static_cast<int32_t>(handle.node);
  if (!is_current(handle) || at(named).anchors < 1)
    TVM_FFI_THROW(ValueError) << "handle must be locked, got one of " << handle.num_tokens << " tokens that is not.";
  --at(named).anchors;
  ++time_;
  for (int32_t id = named; id >= 0; id = at(id).parent) {
    RadixTreeNode& node = at(id);
    node.last_access = time_;
    if (node.parent >= 0 && --node.locks == 0) num_evictable_ += node.run.num_pages();
  }
  refresh(named);
}

RadixTreeHandle RadixTree::ancestor(RadixTreeHandle handle, int64_t num_tokens) {
  check_current(handle);
  if (num_tokens < 1 || num_tokens > handle.num_tokens || num_tokens % page_size_ != 0)
    TVM_FFI_THROW(ValueError) << "num_tokens must be whole pages of the handle's, got " << num_tokens << ".";
  int32_t id = end_of(static_cast<int32_t>(handle.node), num_tokens);
  const int64_t kept = num_tokens / page_size_ - at(id).num_before;
  if (kept < at(id).run.num_pages()) id = split(id, kept);
  return {id, at(id).version, num_tokens};
}

void RadixTree::copy_tokens(RadixTreeHandle handle, int64_t start, int64_t* tokens, int64_t room) const {
  check_current(handle);
  if (start < 0 || handle.num_tokens - start > room) TVM_FFI_THROW(ValueError) << "tokens must have room for all of them.";
  int64_t end = handle.num_tokens;
  for (int32_t id = end_of(static_cast<int32_t>(handle.node), end); end > start; id = at(id).parent) {
    const PageRun& run = at(id).run;
    const int64_t first = at(id).num_before * page_size_, from = std::max(first, start);
    with_tokens(run.tokens_at(from - first), run.is_wide(),
                [&](const auto* ids) { std::copy(ids, ids + (end - from), tokens + (from - start)); });
    end = first;
  }
}

int64_t RadixTree::evict(int64_t num_pages, int32_t* pages) {
  int64_t num_dropped = 0;
  while (num_dropped < num_pages && !queue_.is_empty()) {
    const int32_t id = queue_.first();
    if (!queue_.has_rank(id)) refresh(id);
    if (!queue_.has_rank(id)) break;
    if (queue_.first() != id) continue;
    PageRun& run = at(id).run;
    const int64_t count = std::min(num_pages - num_dropped, run.num_pages()), kept = run.num_pages() - count;
    std::copy(run.pages() + kept, run.pages() + run.num_pages(), pages + num_dropped);
    for (int64_t i = num_dropped; i < num_dropped + count; ++i) held_[pages[i] >> 6] &= ~(uint64_t{1} << (pages[i] & 63));
    num_dropped += count;
    num_cached_ -= count;
    num_evictable_ -= count;
    if (kept > 0) {
      run.truncate(kept, page_size_);
      ++at(id).version;
      refresh(id);
    } else {
      detach(id);
    }
  }
  return num_dropped;
}

bool RadixTree::holds(int64_t page) const {
  return page >= 0 && static_cast<size_t>(page >> 6) < held_.size() && (held_[page >> 6] >> (page & 63) & 1) != 0;
}

void RadixTree::held_pages(int32_t* pages) const {
  for (size_t word = 0; word < held_.size(); ++word) {
    for (int64_t bit = 0; bit < 64; ++bit) {
      if ((held_[word] >> bit & 1) != 0) *pages++ = static_cast<int32_t>(64 * word + bit);
    }
  }
}

std::vector<int32_t> RadixTree::nodes() const {
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < num_made_; ++id) {
    if (at(id).is_used && (at(id).parent >= 0 || at(id).num_children > 0)) ids.push_back(id);
  }
  return ids;
}

const RadixTreeNode& RadixTree::node(int64_t id) const {
  if (id < 0 || id >= num_made_ || !at(id).is_used) TVM_FFI_THROW(ValueError) << "node must be in use, got " << id << ".";
  return at(id);
}

std::string RadixTree::defect() const {
  size_t num_filed = 0;
  for (int32_t id : nodes()) {
    const RadixTreeNode& node = at(id);
    if (is_evictable(id) != queue_.contains(id)) return "the queue must hold the evictable leaves and no others";
    if (node.parent < 0) continue;
    ++num_filed;
    const RadixTreeNode& above = at(node.parent);
    if (node.num_before != above.num_before + above.run.num_pages()) return "a node must know how many pages are above it";
    const uint32_t hash =
        with_tokens(node.run.tokens(), node.run.is_wide(), [&](const auto* ids) { return child_hash(node.parent, ids); });
    if (hash != node.hash || table_.find(hash, [&](int32_t other) { return other == id; }) != id)
      return "the table must file every node under its parent and first page";
  }
  if (num_filed != table_.count()) return "the table must file every node once";
  return queue_.is_sound() ? "" : "the queue must be in order";
}

bool RadixTree::is_evictable(int32_t id) const {
  const RadixTreeNode& node = at(id);
  return node.is_used && node.locks == 0 && node.num_children == 0 && node.parent >= 0;
}

int32_t RadixTree::new_node(int32_t parent) {
  int32_t id = first_unused_;
  if (id >= 0) {
    first_unused_ = at(id).parent;
  } else {
    id = num_made_++;
    const size_t chunk = static_cast<size_t>(id >> kChunkBits);
    if (chunk == chunks_.size()) chunks_.push_back(std::make_unique<RadixTreeNode[]>(1 << kChunkBits));
    at(id).version = first_version_;
  }
  RadixTreeNode& node = at(id);
  node.is_used = true;
  node.parent = parent;
  node.num_before = parent < 0 ? 0 : static_cast<int32_t>(at(parent).num_before + at(parent).run.num_pages());
  node.created = node.last_access = time_;
  return id;
}

void RadixTree::free_node(int32_t id) {
  RadixTreeNode& node = at(id);
  const int64_t version = node.version + 1;
  node = RadixTreeNode();
  node.version = version;
  node.parent = first_unused_;
  first_unused_ = id;
}

template <typename T>
uint32_t RadixTree::child_hash(int32_t parent, const T* first_page) const {
  return hash_tokens(first_page, page_size_, seed_ ^ static_cast<uint64_t>(parent) * 0xff51afd7ed558ccd);
}

template <typename T>
int64_t RadixTree::count_equal_pages(int32_t id, int64_t first_page, const T* ids, int64_t num_pages) const {
  const PageRun& run = at(id).run;
  const int64_t count = std::min(run.num_pages() - first_page, num_pages) * page_size_;
  return with_tokens(run.tokens_at(first_page * page_size_), run.is_wide(),
                     [&](const auto* tokens) { return common_prefix(tokens, ids, count); }) /
         page_size_;
}

/// Follows `ids` from `start` on, behind the first `num_before` pages of the prompt, as far as whole pages agree.
template <typename T>
void RadixTree::find(int32_t start, int64_t num_before, const T* ids, int64_t num_pages) {
  path_.clear();
  num_found_ = num_found_in_last_ = 0;
  const int64_t num_passed = num_before - at(start).num_before;
  if (num_passed < at(start).run.num_pages()) {
    num_found_ = count_equal_pages(start, num_passed, ids, num_pages);
    path_.push_back(start);
    num_found_in_last_ = num_passed + num_found_;
    if (num_found_in_last_ < at(start).run.num_pages()) return;
  }
  for (int32_t node = start; num_found_ < num_pages;) {
    const T* rest = ids + num_found_ * page_size_;
    int64_t num_equal = 0;
    const int32_t child = table_.find(child_hash(node, rest), [&](int32_t id) {
      if (at(id).parent != node) return false;
      num_equal = count_equal_pages(id, 0, rest, num_pages - num_found_);
      return num_equal > 0;
    });
    if (child < 0) break;
    path_.push_back(child);
    num_found_ += num_equal;
    num_found_in_last_ = num_equal;
    if (num_equal < at(child).run.num_pages()) break;
    node = child;
  }
}

/// Stamps what the last walk passed, and splits the last node where the walk left it; returns where it ends.
int32_t RadixTree::use_path(int32_t start, int64_t num_hits) {
  at(start).last_access = ++time_;
  if (path_.empty()) return start;
  int32_t& last = path_.back();
  if (num_found_in_last_ < at(last).run.num_pages()) last = split(last, num_found_in_last_);
  for (int32_t id : path_) {
    at(id).last_access = time_;
    at(id).num_hits += num_hits;
  }
  return last;
}

template <typename T>
RadixTreeGrowth RadixTree::insert_below(int32_t start, int64_t start_tokens, const T* ids, int64_t num_pages,
                                        const int32_t* pages, bool only_new, int64_t priority) {
  find(start, start_tokens / page_size_, ids, num_pages);
  const int64_t num_new = only_new && num_found_ > 0 ? 0 : num_pages - num_found_;
  if (num_new > 0) hold(pages + num_found_, num_new);
  int32_t end = use_path(start, 0);
  for (int32_t id : path_) at(id).priority = std::max(at(id).priority, priority);
  const PageRun& before = at(end).run;
  const int64_t parent_page = before.num_pages() == 0 ? -1 : before.pages()[before.num_pages() - 1];
  if (num_new > 0) {
    num_cached_ += num_new;
    const bool grows = end == start && start_tokens > 0 && at(end).num_children == 0 && at(end).anchors == 1;
    if (!grows) {
      const int32_t leaf = new_node(end);
      at(leaf).hash = child_hash(end, ids + num_found_ * page_size_);
      at(leaf).priority = priority;
      table_.insert(at(leaf).hash, leaf);
      if (at(end).parent < 0 && at(end).num_children == 0)
        empty_roots_.erase(std::find(empty_roots_.begin(), empty_roots_.end(), end));
      ++at(end).num_children;
      refresh(end);
      num_evictable_ += num_new;
      end = leaf;
    }
    at(end).run.append(ids + num_found_ * page_size_, pages + num_found_, num_new, page_size_);
  }
  refresh(end);
  return {{end, at(end).version, start_tokens + (num_found_ + num_new) * page_size_}, num_found_, parent_page, -1};
}

/// Moves the first pages of a node, not all of them, into a new parent, and returns that: handles that name the node still
/// mean the same tokens.
int32_t RadixTree::split(int32_t id, int64_t num_pages) {
  const int32_t prefix = new_node(at(id).parent);
  RadixTreeNode &node = at(id), &above = at(prefix);
  with_tokens(node.run.tokens(), node.run.is_wide(),
              [&](const auto* ids) { above.run.append(ids, node.run.pages(), num_pages, page_size_); });
  node.run.drop_front(num_pages, page_size_);
  above.created = node.created;
  above.last_access = node.last_access;
  above.num_hits = node.num_hits;
  above.priority = node.priority;
  above.locks = node.locks;
  above.num_children = 1;
  node.num_before += static_cast<int32_t>(num_pages);
  above.hash = node.hash;
  table_.replace(node.hash, id, prefix);
  node.parent = prefix;
  node.hash = with_tokens(node.run.tokens(), node.run.is_wide(), [&](const auto* ids) { return child_hash(prefix, ids); });
  table_.insert(node.hash, id);
  if (queue_.contains(id)) refresh(id);
  return prefix;
}

/// Puts a node into the queue, where it belongs, or out of it, as its state says.
void RadixTree::refresh(int32_t id) {
  if (!is_evictable(id)) {
    if (queue_.contains(id)) queue_.remove(id);
    return;
  }
  const RadixTreeNode& node = at(id);
  switch (order_) {
    case EvictionOrder::kLRU: return queue_.put(id, LeafRank{node.last_access, 0});
    case EvictionOrder::kLFU: return queue_.put(id, LeafRank{node.num_hits, node.last_access});
    case EvictionOrder::kFIFO: return queue_.put(id, LeafRank{node.created, 0});
    case EvictionOrder::kMRU: return queue_.put(id, LeafRank{-node.last_access, 0});
    case EvictionOrder::kFILO: return queue_.put(id, LeafRank{-node.created, 0});
    case EvictionOrder::kSLRU: return queue_.put(id, LeafRank{node.num_hits > 0, node.last_access});
    case EvictionOrder::kPriority: return queue_.put(id, LeafRank{node.priority, node.last_access});
    case EvictionOrder::kLongRank:
      return queue_.put(id, long_rank_(node.run.num_pages(), node.created, node.last_access, node.num_hits, node.priority));
  }
}

void RadixTree::detach(int32_t id) {
  const int32_t parent = at(id).parent;
  table_.erase(at(id).hash, id);
  queue_.remove(id);
  free_node(id);
  --at(parent).num_children;
  if (at(parent).parent >= 0) {
    refresh(parent);
  } else if (at(parent).num_children == 0) {
    empty_roots_.push_back(parent);
  }
}

/// Marks pages as held; refuses, and marks nothing, when one is held already or named twice.
void RadixTree::hold(const int32_t* pages, int64_t count) {
  const int64_t largest = *std::max_element(pages, pages + count);
  const size_t last_word = static_cast<size_t>(largest >> 6);
  if (last_word >= held_.size()) held_.resize(last_word + 1 + held_.size() / 4);
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bit = uint64_t{1} << (pages[i] & 63);
    uint64_t& word = held_[pages[i] >> 6];
    if ((word & bit) == 0) {
      word |= bit;
      continue;
    }
    for (int64_t j = 0; j < i; ++j) held_[pages[j] >> 6] &= ~(uint64_t{1} << (pages[j] & 63));
    const bool was_held = (word & bit) != 0;
    if (!was_held) TVM_FFI_THROW(ValueError) << "pages must name each page once, got page " << pages[i] << " twice.";
    TVM_FFI_THROW(ValueError) << "pages must not be in the cache yet, got page " << pages[i]
                              << ", which is there under other tokens. Commit the same token ids for pages that "
                                 "sequences share.";
  }
}

bool RadixTree::is_root(int64_t id) const { return id >= 0 && id < num_made_ && at(id).is_used && at(id).parent < 0; }

/// Whether the node is the one that was named, and holds the end of the prefix or is behind it.
bool RadixTree::is_current(RadixTreeHandle handle) const {
  if (handle.node < 0 || handle.node >= num_made_) return false;
  const RadixTreeNode& node = at(handle.node);
  return node.is_used && node.version == handle.version && handle.num_tokens > 0 && handle.num_tokens % page_size_ == 0 &&
         handle.num_tokens / page_size_ <= node.num_before + node.run.num_pages();
}

/// The node that holds the last of the first `num_tokens` tokens of a prefix that ends with a node.
int32_t RadixTree::end_of(int32_t id, int64_t num_tokens) const {
  while (at(id).num_before * page_size_ >= num_tokens) id = at(id).parent;
  return id;
}

void RadixTree::check_current(RadixTreeHandle handle) const {
  if (is_current(handle)) return;
  TVM_FFI_THROW(ValueError) << "handle must name a prefix that is still cached, got one of " << handle.num_tokens
                            << " tokens that changed. Lock a handle before the next insert or eviction.";
}

}  // namespace pagedkv
