#include "attend.h"

namespace pagedkv {
namespace {

Pages pages_of(const TensorView& pages) {
  return {data<char>(pages), pages.strides()[0], pages.strides()[1], pages.strides()[2]};
}

Scales scales_of(const Optional<TensorView>& scales) {
  if (!scales.has_value()) return {};
  const TensorView& tensor = scales.value();
  return {data<float>(tensor), tensor.strides()[0], tensor.strides()[1], tensor.strides()[2]};
}

void check_scales(const Optional<TensorView>& scales, const TensorView& pages) {
  if (scales.has_value() && (scales.value().size(0) < pages.size(0) || scales.value().size(1) != pages.size(2) ||
                             scales.value().size(2) != pages.size(1)))
    TVM_FFI_THROW(ValueError) << "scales must have shape [N, Hk, P] of their pages.";
}

/// Positions reach from -(q_len - kv_len) to kv_len - 1.
void check_rotation(const Rotation& rotation, int64_t num_positions, const AttentionBatch& batch, int64_t dim) {
  if (!rotation.table) return;
  if (rotation.half * 2 > dim) TVM_FFI_THROW(ValueError) << "the rotated columns must lie in the head.";
  for (int64_t s = 0; s < batch.num_seqs; ++s)
    if (std::max<int64_t>(batch.seq_lens[s], batch.query_len(s) - batch.seq_lens[s] + 1) > num_positions)
      TVM_FFI_THROW(ValueError) << "the table of angles must reach every position, got " << num_positions << " rows.";
}

}  // namespace

/// Attention of each sequence's new tokens over its pages (NHD order, any strides but the last); fills out and lse.
/// A row's bits depend on its sequence alone: not on the batch, the pages, the split of query rows or the threads.
void paged_attention(TensorView query, TensorView key_pages, TensorView value_pages, TensorView query_indptr,
                     TensorView page_indptr, TensorView page_indices, TensorView seq_lens, Optional<TensorView> work,
                     bool causal, int64_t window_left, double sm_scale, double soft_cap, double value_scale,
                     Optional<TensorView> sinks, Optional<TensorView> alibi_slopes, Optional<TensorView> mask,
                     Optional<TensorView> mask_indptr, Optional<TensorView> key_scales, Optional<TensorView> value_scales,
                     Optional<TensorView> rope_table, bool rope_interleaved, Optional<TensorView> exp_entries,
                     Optional<TensorView> exp_powers, double exp_steps_per_unit, TensorView out, Optional<TensorView> lse,
                     int64_t num_threads) {
  if (dtype_of(key_pages) != dtype_of(value_pages)) TVM_FFI_THROW(TypeError) << "keys and values must have one dtype.";
  if (key_pages.size(3) % 8 || value_pages.size(3) % 8)
    TVM_FFI_THROW(ValueError) << "head dims must be multiples of 8, got " << key_pages.size(3) << " and "
                              << value_pages.size(3) << ".";
  check_scales(key_scales, key_pages);
  check_scales(value_scales, value_pages);
  Call call{};
  call.batch = checked_batch(query_indptr, page_indptr, page_indices, seq_lens, mask, mask_indptr, key_pages.size(1),
                             query.size(1), key_pages.size(2), query.size(0),
                             std::min(key_pages.size(0), value_pages.size(0)), causal, window_left);
  call.rule = {static_cast<float>(sm_scale), static_cast<float>(soft_cap)};
  call.value_factor = static_cast<float>(value_scale);
  call.query_dtype = dtype_of(query);
  call.out_dtype = dtype_of(out);
  call.query = data<char>(query);
  call.query_token_stride = query.strides()[0];
  call.query_head_stride = query.strides()[1];
  call.keys = pages_of(key_pages);
  call.values = pages_of(value_pages);
  call.key_dim = key_pages.size(3);
  call.value_dim = value_pages.size(3);
  call.key_scales = scales_of(key_scales);
  call.value_scales = scales_of(value_scales);
  if (rope_table.has_value()) {
    call.rotation = {data<float>(rope_table.value()), rope_table.value().size(1), rope_interleaved};
    check_rotation(call.rotation, rope_table.value().size(0), call.batch, call.key_dim);
  }
  if (exp_entries.has_value() && exp_powers.has_value())
    call.exp_table = {data<float>(exp_entries.value()), data<float>(exp_powers.value()),
                      static_cast<float>(exp_entries.value().numel() - 1), static_cast<float>(exp_powers.value().numel() - 1),
                      static_cast<float>(exp_steps_per_unit)};
  call.out = data<char>(out);
  call.lse = const_cast<float*>(data_or_null<float>(lse));
  call.sinks = data_or_null<float>(sinks);
  call.alibi_slopes = data_or_null<float>(alibi_slopes);
  call.mask = data_or_null<uint8_t>(mask);
  call.mask_indptr = data_or_null<int64_t>(mask_indptr);
  attend(call, dtype_of(key_pages), work, num_threads);
}

/// The same over latent pages [N, P, C], which are keys and values at once, and pages of rope keys [N, P, R].
void mla_attention(TensorView query, Optional<TensorView> query_rope, TensorView latent_pages,
                   Optional<TensorView> rope_pages, TensorView query_indptr, TensorView page_indptr,
                   TensorView page_indices, TensorView seq_lens, Optional<TensorView> work, bool causal,
                   int64_t window_left, double sm_scale, Optional<TensorView> mask, Optional<TensorView> mask_indptr,
                   TensorView out, Optional<TensorView> lse, int64_t num_threads) {
  Call call{};
  int64_t num_pages = latent_pages.size(0);
  if (query_rope.has_value() != rope_pages.has_value())
    TVM_FFI_THROW(ValueError) << "the rope part must be given of query and pages, or of neither.";
  call.keys = call.values = {data<char>(latent_pages), latent_pages.strides()[0], latent_pages.strides()[1], 0};
  call.key_dim = call.value_dim = latent_pages.size(2);
  if (rope_pages.has_value()) {
    const TensorView &tails = rope_pages.value(), &query_tail = query_rope.value();
    if (dtype_of(tails) != dtype_of(latent_pages) || dtype_of(query_tail) != dtype_of(query))
      TVM_FFI_THROW(TypeError) << "latent and rope parts must have one dtype.";
    call.tails = {data<char>(tails), tails.strides()[0], tails.strides()[1], 0};
    call.tail_dim = tails.size(2);
    call.query_tail = data<char>(query_tail);
    call.tail_token_stride = query_tail.strides()[0];
    call.tail_head_stride = query_tail.strides()[1];
    num_pages = std::min(num_pages, tails.size(0));
  }
  if (call.key_dim % 8 || call.tail_dim % 8)
    TVM_FFI_THROW(ValueError) << "latent and rope dims must be multiples of 8, got " << call.key_dim << " and "
                              << call.tail_dim << ".";
  call.batch = checked_batch(query_indptr, page_indptr, page_indices, seq_lens, mask, mask_indptr, latent_pages.size(1),
                             query.size(1), 1, query.size(0), num_pages, causal, window_left);
  call.rule = {static_cast<float>(sm_scale), 0.0f};
  call.value_factor = 1.0f;
  call.query_dtype = dtype_of(query);
  call.out_dtype = dtype_of(out);
  call.query = data<char>(query);
  call.query_token_stride = query.strides()[0];
  call.query_head_stride = query.strides()[1];
  call.out = data<char>(out);
  call.lse = const_cast<float*>(data_or_null<float>(lse));
  call.mask = data_or_null<uint8_t>(mask);
  call.mask_indptr = data_or_null<int64_t>(mask_indptr);
  attend(call, dtype_of(latent_pages), work, num_threads);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mla_attention, mla_attention);

}  // namespace pagedkv
