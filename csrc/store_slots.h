#pragma once

#include "moves.h"

#include <initializer_list>
#include <vector>

/// What storing tokens in slots takes, whether they are moved or quantised.
namespace pagedkv {

/// The slot that each token writes, -1 for none: of tokens with one slot the last alone keeps it, so that threads never
/// meet in a slot and the outcome does not depend on them.
inline std::vector<int64_t> slots_to_write(const Indices& slots) {
  std::vector<int64_t> result(static_cast<size_t>(slots.count));
  bool ascending = true;
  int64_t highest = -1;
  for (int64_t i = 0; i < slots.count; ++i) {
    result[i] = slots[i];
    if (slots[i] < 0) continue;
    ascending &= slots[i] > highest;
    highest = slots[i];
  }
  if (ascending) return result;

  int shift = 64;
  for (int64_t size = 1; size < 2 * slots.count; size *= 2) --shift;
  std::vector<int64_t> seen(size_t{1} << (64 - shift), -1);
  for (int64_t i = slots.count - 1; i >= 0; --i) {
    if (result[i] < 0) continue;
    size_t place = (static_cast<uint64_t>(result[i]) * 0x9E3779B97F4A7C15u) >> shift;
    while (seen[place] >= 0 && seen[place] != result[i]) place = (place + 1) & (seen.size() - 1);
    if (seen[place] == result[i]) {
      result[i] = -1;
    } else {
      seen[place] = result[i];
    }
  }
  return result;
}

/// Where keys, or values, come from and go to.
struct StoreSide {
  StoreSide(const TensorView& tokens, const TensorView& pages)
      : rows(tokens), slots(pages), heads(tokens.size(1)), dim(tokens.size(2)), row_bytes(dim * item_bytes(tokens)) {}
  StoreSide(const StoreSide&) = delete;

  /// Reads from a compact copy if the tokens lie in memory that the call writes.
  void stage_if_meeting(const TensorView& tokens, std::initializer_list<TensorView> written) {
    bool meets = false;
    for (const TensorView& tensor : written) meets = meets || ranges_meet(tokens, tensor);
    if (!meets) return;
    staging.resize(static_cast<size_t>(tokens.size(0) * heads * row_bytes));
    for (int64_t i = 0; i < tokens.size(0); ++i) {
      copy_token({staging.data() + i * heads * row_bytes, row_bytes}, rows.at(i), heads, row_bytes, false);
    }
    rows.start = staging.data();
    rows.head_stride = row_bytes;
    rows.token_stride = heads * row_bytes;
  }

  TokenRows rows;
  SlotPages slots;
  int64_t heads, dim, row_bytes;
  std::vector<char> staging;
};

}  // namespace pagedkv
