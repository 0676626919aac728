#include "moves.h"

#include <vector>

namespace pagedkv {
namespace {

/// The slot that each token writes, -1 for none: of tokens with one slot the last alone keeps it, so that threads never
/// meet in a slot and the outcome does not depend on them.
std::vector<int64_t> slots_to_write(const Indices& slots) {
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

/// A compact copy of tokens [T, Hk, D], for inputs that lie in the memory to be written.
std::vector<char> staged(const TokenRows& tokens, int64_t count, int64_t heads, int64_t row_bytes) {
  std::vector<char> copy(static_cast<size_t>(count * heads * row_bytes));
  for (int64_t i = 0; i < count; ++i) {
    copy_token({copy.data() + i * heads * row_bytes, row_bytes}, tokens.at(i), heads, row_bytes, false);
  }
  return copy;
}

}  // namespace

/// Writes key [T, Hk, D] and value [T, Hk, Dv] into the slots of NHD-ordered pages; checks every slot first.
void store_kv(TensorView key, TensorView value, TensorView key_pages, TensorView value_pages, TensorView slot_mapping,
              int64_t num_threads) {
  const Indices slots(slot_mapping);
  check_slots("slot_mapping", slots, key_pages.size(0) * key_pages.size(1));
  if (slots.count == 0) return;
  const SlotPages key_slots(key_pages), value_slots(value_pages);
  TokenRows keys(key), values(value);
  std::vector<char> staging[2];
  const auto stage_if_overlapping = [&](const TensorView& tensor, const SlotPages& pages, TokenRows& rows, int which) {
    if (!ranges_meet(tensor, key_pages) && !ranges_meet(tensor, value_pages)) return;
    staging[which] = staged(rows, slots.count, pages.heads, pages.row_bytes);
    rows.start = staging[which].data();
    rows.head_stride = pages.row_bytes;
    rows.token_stride = pages.heads * pages.row_bytes;
  };
  stage_if_overlapping(key, key_slots, keys, 0);
  stage_if_overlapping(value, value_slots, values, 1);

  const std::vector<int64_t> targets = slots_to_write(slots);
  const int64_t num_bytes = slots.count * key_slots.heads * (key_slots.row_bytes + value_slots.row_bytes);
  const bool streamed = num_bytes >= kStreamedBytes;
#pragma omp parallel num_threads(num_workers(num_bytes, num_threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < slots.count; ++i) {
      if (targets[i] < 0) continue;
      copy_token(key_slots.at(targets[i]), keys.at(i), key_slots.heads, key_slots.row_bytes, streamed);
      copy_token(value_slots.at(targets[i]), values.at(i), value_slots.heads, value_slots.row_bytes, streamed);
    }
    end_stream(streamed);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_kv, store_kv);

}  // namespace pagedkv
