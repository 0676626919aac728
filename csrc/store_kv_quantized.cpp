#include "quantize.h"
#include "store_slots.h"

namespace pagedkv {
namespace {

/// Scales [N, Hk, P] of any strides.
struct SlotScales {
  explicit SlotScales(const TensorView& scales)
      : start(data<char>(scales)),
        page_size(scales.size(2)),
        page_stride(stride_bytes(scales, 0)),
        head_stride(stride_bytes(scales, 1)),
        offset_stride(stride_bytes(scales, 2)) {}

  void write(int64_t slot, const float* from, int64_t heads) const {
    const int64_t page = slot / page_size;
    char* to = start + page * page_stride + (slot - page * page_size) * offset_stride;
    for (int64_t head = 0; head < heads; ++head, to += head_stride) *reinterpret_cast<float*>(to) = from[head];
  }

  char* start;
  int64_t page_size, page_stride, head_stride, offset_stride;
};

/// What quantising one side takes besides the side itself.
struct Quantizer {
  Quantizer(const StoreSide& side, const TensorView& tokens, const TensorView& pages, const TensorView& scales)
      : side(side), scales(scales), quantize(quantize_token_between(tokens, pages)) {}

  /// Codes go through the caches, unlike large moves: there are few of them for each number read, and streaming them by way
  /// of a row of their own made stores of 16384 tokens a fifth slower on an AVX2 core.
  void token(int64_t i, int64_t slot, float* row_scales) const {
    quantize(side.rows.at(i), side.slots.at(slot), side.heads, side.dim, row_scales);
    scales.write(slot, row_scales, side.heads);
  }

  const StoreSide& side;
  SlotScales scales;
  QuantizeToken quantize;
};

}  // namespace

/// Quantises key [T, Hk, D] and value [T, Hk, Dv], of any float dtypes, into the slots of NHD-ordered int8 or float8_e4m3fn
/// pages and their scales [N, Hk, P]; checks every slot first.
void store_kv_quantized(TensorView key, TensorView value, TensorView key_pages, TensorView value_pages,
                        TensorView slot_mapping, TensorView key_scales, TensorView value_scales, int64_t num_threads) {
  const Indices slots(slot_mapping);
  check_slots("slot_mapping", slots, key_pages.size(0) * key_pages.size(1));
  if (slots.count == 0) return;
  StoreSide keys(key, key_pages), values(value, value_pages);
  keys.stage_if_meeting(key, {key_pages, value_pages, key_scales, value_scales});
  values.stage_if_meeting(value, {key_pages, value_pages, key_scales, value_scales});
  const Quantizer key_quantizer(keys, key, key_pages, key_scales);
  const Quantizer value_quantizer(values, value, value_pages, value_scales);

  const std::vector<int64_t> targets = slots_to_write(slots);
  const int64_t num_bytes = slots.count * keys.heads * (keys.row_bytes + values.row_bytes);
#pragma omp parallel num_threads(num_workers(num_bytes, num_threads))
  {
    std::vector<float> row_scales(static_cast<size_t>(keys.heads));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < slots.count; ++i) {
      if (targets[i] < 0) continue;
      key_quantizer.token(i, targets[i], row_scales.data());
      value_quantizer.token(i, targets[i], row_scales.data());
    }
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_kv_quantized, store_kv_quantized);

}  // namespace pagedkv
