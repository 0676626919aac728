#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace pagedkv {

/// Finds nodes by hash: open addressing with linear steps, at most three quarters full. The caller compares what it finds.
class NodeTable {
 public:
  /// The first node of this hash for which `is_wanted` says yes, or -1.
  template <typename F>
  int32_t find(uint32_t hash, F is_wanted) const {
    if (slots_.empty()) return -1;
    for (uint32_t at = hash & mask_; slots_[at].node >= 0; at = (at + 1) & mask_) {
      if (slots_[at].hash == hash && is_wanted(slots_[at].node)) return slots_[at].node;
    }
    return -1;
  }

  void insert(uint32_t hash, int32_t node) {
    if (4 * (count_ + 1) > 3 * slots_.size()) grow();
    place(hash, node);
    ++count_;
  }

  void erase(uint32_t hash, int32_t node) {
    uint32_t hole = slot_of(hash, node);
    // Entries behind the hole move up unless they would come before their home.
    for (uint32_t at = (hole + 1) & mask_; slots_[at].node >= 0; at = (at + 1) & mask_) {
      if (((at - slots_[at].hash) & mask_) < ((at - hole) & mask_)) continue;
      slots_[hole] = slots_[at];
      hole = at;
    }
    slots_[hole].node = -1;
    --count_;
  }

  /// Files another node in the place of one of the same hash.
  void replace(uint32_t hash, int32_t old_node, int32_t node) { slots_[slot_of(hash, old_node)].node = node; }

  size_t count() const { return count_; }
  int64_t num_bytes() const { return static_cast<int64_t>(slots_.size() * sizeof(Slot)); }

 private:
  struct Slot {
    uint32_t hash;
    int32_t node;  // -1: empty
  };

  uint32_t slot_of(uint32_t hash, int32_t node) const {
    uint32_t at = hash & mask_;
    while (slots_[at].node != node) at = (at + 1) & mask_;
    return at;
  }

  void place(uint32_t hash, int32_t node) {
    uint32_t at = hash & mask_;
    while (slots_[at].node >= 0) at = (at + 1) & mask_;
    slots_[at] = {hash, node};
  }

  void grow() {
    std::vector<Slot> old(slots_.empty() ? 16 : 2 * slots_.size(), Slot{0, -1});
    old.swap(slots_);
    mask_ = static_cast<uint32_t>(slots_.size() - 1);
    for (const Slot& slot : old) {
      if (slot.node >= 0) place(slot.hash, slot.node);
    }
  }

  std::vector<Slot> slots_;
  size_t count_ = 0;
  uint32_t mask_ = 0;
};

}  // namespace pagedkv
