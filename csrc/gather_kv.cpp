#include "moves.h"

namespace pagedkv {

/// Reads the slots of NHD-ordered pages into contiguous key [T, Hk, D] and value [T, Hk, Dv]; a negative slot gives zeros.
void gather_kv(TensorView key_pages, TensorView value_pages, TensorView slots_tensor, TensorView key, TensorView value,
               int64_t num_threads) {
  const Indices slots(slots_tensor);
  check_slots("slots", slots, key_pages.size(0) * key_pages.size(1));
  const SlotPages key_slots(key_pages), value_slots(value_pages);
  const int64_t key_bytes = key_slots.heads * key_slots.row_bytes, value_bytes = value_slots.heads * value_slots.row_bytes;
  const int64_t num_bytes = slots.count * (key_bytes + value_bytes);
  if (num_bytes == 0) return;
  const TokenRow keys{data<char>(key), key_slots.row_bytes}, values{data<char>(value), value_slots.row_bytes};
  const bool streamed = num_bytes >= kStreamedBytes;
#pragma omp parallel num_threads(num_workers(num_bytes, num_threads))
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < slots.count; ++i) {
      const TokenRow key_row{keys.start + i * key_bytes, keys.head_stride};
      const TokenRow value_row{values.start + i * value_bytes, values.head_stride};
      if (i + 1 < slots.count && slots[i + 1] >= 0) {
        prefetch_token(key_slots.at(slots[i + 1]), key_slots.heads, key_slots.row_bytes);
        prefetch_token(value_slots.at(slots[i + 1]), value_slots.heads, value_slots.row_bytes);
      }
      if (slots[i] < 0) {
        std::memset(key_row.start, 0, static_cast<size_t>(key_bytes));
        std::memset(value_row.start, 0, static_cast<size_t>(value_bytes));
        continue;
      }
      copy_token(key_row, key_slots.at(slots[i]), key_slots.heads, key_slots.row_bytes, streamed);
      copy_token(value_row, value_slots.at(slots[i]), value_slots.heads, value_slots.row_bytes, streamed);
    }
    end_stream(streamed);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_kv, gather_kv);

}  // namespace pagedkv
