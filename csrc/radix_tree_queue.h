#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace pagedkv {

/// When a leaf goes: the least rank first, and of equal ranks the one that came into the queue first.
struct LeafRank {
  int64_t first, second;
};

/// The evictable leaves in a heap that knows where each node is, so that a changed rank costs one sift and nothing is stale.
/// Ranks are two integers, or, for the policy of a user, any number of floats.
class LeafQueue {
 public:
  explicit LeafQueue(bool has_long_ranks) : has_long_ranks_(has_long_ranks) {}

  bool contains(int32_t node) const { return static_cast<size_t>(node) < at_.size() && at_[node] >= 0; }
  bool is_empty() const { return heap_.empty(); }
  int32_t first() const { return heap_.front().node; }
  size_t count() const { return heap_.size(); }
  int64_t serial(int32_t node) const { return contains(node) ? heap_[at_[node]].serial : -1; }
  /// False for a long rank without numbers, which is the least.
  bool has_rank(int32_t node) const { return !has_long_ranks_ || !long_ranks_[node].empty(); }

  /// Puts the node where its rank belongs, into the queue if it is not there.
  void put(int32_t node, LeafRank rank) { put(node, rank, {}); }
  void put(int32_t node, std::vector<double> long_rank) { put(node, LeafRank{0, 0}, std::move(long_rank)); }

  void remove(int32_t node) {
    const size_t hole = static_cast<size_t>(at_[node]);
    at_[node] = -1;
    const Entry last = heap_.back();
    heap_.pop_back();
    if (hole == heap_.size()) return;
    heap_[hole] = last;
    at_[last.node] = static_cast<int32_t>(hole);
    restore(hole);
  }

  /// Whether every entry is where it must be.
  bool is_sound() const {
    for (size_t i = 0; i < heap_.size(); ++i) {
      if (at_[heap_[i].node] != static_cast<int32_t>(i)) return false;
      if (i > 0 && is_before(heap_[i], heap_[(i - 1) / kFanout])) return false;
    }
    return true;
  }

  int64_t num_bytes() const { return static_cast<int64_t>(heap_.capacity() * sizeof(Entry) + at_.capacity() * 4); }

 private:
  static constexpr size_t kFanout = 4;

  struct Entry {
    LeafRank rank;
    int64_t serial;
    int32_t node;
  };

  void put(int32_t node, LeafRank rank, std::vector<double> long_rank) {
    if (has_long_ranks_) {
      if (static_cast<size_t>(node) >= long_ranks_.size()) long_ranks_.resize(static_cast<size_t>(node) + 1);
      long_ranks_[node] = std::move(long_rank);
    }
    if (!contains(node)) {
      if (static_cast<size_t>(node) >= at_.size()) at_.resize(static_cast<size_t>(node) + 1, -1);
      at_[node] = static_cast<int32_t>(heap_.size());
      heap_.push_back({rank, next_serial_++, node});
    } else {
      heap_[at_[node]].rank = rank;
    }
    restore(static_cast<size_t>(at_[node]));
  }

  bool is_before(const Entry& a, const Entry& b) const {
    if (has_long_ranks_) {
      const auto &left = long_ranks_[a.node], &right = long_ranks_[b.node];
      return left != right ? left < right : a.serial < b.serial;
    }
    if (a.rank.first != b.rank.first) return a.rank.first < b.rank.first;
    if (a.rank.second != b.rank.second) return a.rank.second < b.rank.second;
    return a.serial < b.serial;
  }

  /// Brings the entry at `at` to its place: up, or if it need not go up, down.
  void restore(size_t at) {
    const Entry moved = heap_[at];
    const size_t start = at;
    for (; at > 0 && is_before(moved, heap_[(at - 1) / kFanout]); at = (at - 1) / kFanout) {
      settle(at, heap_[(at - 1) / kFanout]);
    }
    for (bool sinks = at == start; sinks;) {
      size_t least = kFanout * at + 1;
      const size_t end = std::min(least + kFanout, heap_.size());
      for (size_t child = least + 1; child < end; ++child) {
        if (is_before(heap_[child], heap_[least])) least = child;
      }
      sinks = least < end && is_before(heap_[least], moved);
      if (!sinks) break;
      settle(at, heap_[least]);
      at = least;
    }
    settle(at, moved);
  }

  void settle(size_t at, const Entry& entry) {
    heap_[at] = entry;
    at_[entry.node] = static_cast<int32_t>(at);
  }

  std::vector<Entry> heap_;
  std::vector<int32_t> at_;  // by node: its place in the heap, or -1
  std::vector<std::vector<double>> long_ranks_;
  int64_t next_serial_ = 0;
  bool has_long_ranks_;
};

}  // namespace pagedkv
