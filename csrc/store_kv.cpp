#include "store_slots.h"

namespace pagedkv {

/// Writes key [T, Hk, D] and value [T, Hk, Dv] into the slots of NHD-ordered pages; checks every slot first.
void store_kv(TensorView key, TensorView value, TensorView key_pages, TensorView value_pages, TensorView slot_mapping,
              int64_t num_threads) {
  const Indices slots(slot_mapping);
  check_slots("slot_mapping", slots, key_pages.size(0) * key_pages.size(1));
  if (slots.count == 0) return;
  StoreSide keys(key, key_pages), values(value, value_pages);
  keys.stage_if_meeting(key, {key_pages, value_pages});
  values.stage_if_meeting(value, {key_pages, value_pages});

  const std::vector<int64_t> targets = slots_to_write(slots);
  const int64_t num_bytes = slots.count * keys.heads * (keys.row_bytes + values.row_bytes);
  const bool streamed = num_bytes >= kStreamedBytes;
#pragma omp parallel num_threads(num_workers(num_bytes, num_threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < slots.count; ++i) {
      if (targets[i] < 0) continue;
      copy_token(keys.slots.at(targets[i]), keys.rows.at(i), keys.heads, keys.row_bytes, streamed);
      copy_token(values.slots.at(targets[i]), values.rows.at(i), values.heads, values.row_bytes, streamed);
    }
    end_stream(streamed);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_kv, store_kv);

}  // namespace pagedkv
