#pragma once

#include "attention_worker.h"

#include <tvm/ffi/optional.h>

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

/// Runs a call: the items of its work on all threads, then the merge of tiles that several items computed.
namespace pagedkv {

using tvm::ffi::Optional;

template <typename T>
const T* data_or_null(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? data<const T>(tensor.value()) : nullptr;
}

/// Folds the chunks of one row of a tile, in order.
inline void merge_row(const Call& call, const AttentionTile& tile, int64_t head, int64_t row, float* total) {
  const int64_t dim = call.padded_value_dim, row_in_sequence = tile.row_first + row;
  RowState state;
  for (int64_t chunk = tile.chunk_first; chunk < tile.chunk_last; ++chunk) {
    const int64_t slot = tile.state_of(call.batch.num_kv_heads, chunk, head) + row;
    fold_chunk(state, total, call.chunk_states[slot], call.chunk_totals + slot * dim, dim);
  }
  const int64_t token = call.batch.query_indptr[tile.sequence] + row_in_sequence / call.batch.group;
  const int64_t query_head = head * call.batch.group + row_in_sequence % call.batch.group;
  if (call.sinks) fold_sink(state, total, call.sinks[query_head], dim);
  finish_row(call, state, total, token, query_head);
}

template <typename T>
void attend_as(Call& call, int64_t num_threads) {
  const AttentionWork& work = call.work;
  const int workers = static_cast<int>(std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(1, work.num_items)));
  const int64_t floats = std::max(Worker<T>::num_floats(call), call.padded_value_dim);
  Carver sizes(nullptr);
  sizes.take<RowState>(work.num_states);
  sizes.take<float>(work.num_states * call.padded_value_dim);
  const Scratch memory(floats * workers + sizes.num_floats());
  Carver carver(memory.start());
  call.chunk_states = carver.take<RowState>(work.num_states);
  call.chunk_totals = carver.take<float>(work.num_states * call.padded_value_dim);
  float* scratch = carver.take<float>(floats * workers);
  std::atomic<int64_t> taken{0};
  const auto work_off = [&](int number) {
    Worker<T> worker(call, scratch + number * floats);
    for (int64_t i = taken++; i < work.num_items; i = taken++) worker.run(work.items[i]);
  };
  const auto merge_off = [&](int number) {
    int64_t turn = 0;
    for (int64_t i = 0; i < work.num_tiles; ++i) {
      const AttentionTile& tile = work.tiles[i];
      if (tile.state < 0) continue;
      for (int64_t head = 0; head < call.batch.num_kv_heads; ++head)
        if (turn++ % workers == number)
          for (int64_t row = 0; row < tile.rows(); ++row) merge_row(call, tile, head, row, scratch + number * floats);
    }
  };
#if defined(_OPENMP)
  if (workers > 1) {
#pragma omp parallel num_threads(workers)
    {
      // The runtime may give fewer threads than were asked for: numbers are taken, not assumed.
      for (int number = omp_get_thread_num(); number < workers; number += omp_get_num_threads()) work_off(number);
#pragma omp barrier
      for (int number = omp_get_thread_num(); number < workers; number += omp_get_num_threads()) merge_off(number);
    }
    return;
  }
#endif
  for (int number = 0; number < workers; ++number) work_off(number);
  for (int number = 0; number < workers; ++number) merge_off(number);
}

/// The plan is checked when it is made; these are the sentences that keep every address inside the tensors, whatever
/// became of its arrays since.
inline void check_batch(const AttentionBatch& batch, int64_t num_tokens, int64_t num_indices, int64_t num_pages,
                        int64_t mask_size, const int64_t* mask_indptr) {
  const auto refuse = [](const char* what, int64_t sequence) {
    TVM_FFI_THROW(ValueError) << "the plan must be as plan_attention made it, got " << what << " at sequence " << sequence
                              << ". Its arrays were changed, or it was made by hand.";
  };
  if (batch.query_indptr[0] != 0 || batch.page_indptr[0] != 0) refuse("an indptr that does not start with 0", 0);
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t kv_len = batch.seq_lens[s];
    if (batch.query_len(s) < 0) refuse("a query_indptr that decreases", s);
    const int64_t first = batch.page_indptr[s], last = batch.page_indptr[s + 1];
    if (first > last || last > num_indices) refuse("a page_indptr outside page_indices", s);
    if (kv_len < 0 || kv_len > (last - first) * batch.page_size) refuse("a length its pages cannot hold", s);
    for (int64_t i = first; i < last; ++i)
      if (batch.page_indices[i] < 0 || batch.page_indices[i] >= num_pages) refuse("a page id outside the pool", s);
    if (mask_indptr && (mask_indptr[s] < 0 || mask_indptr[s] > mask_size - batch.query_len(s) * kv_len))
      refuse("a mask too short", s);
  }
  if (batch.query_indptr[batch.num_seqs] != num_tokens) refuse("another number of query rows", batch.num_seqs);
}

/// The arrays of a plan as a batch, checked against the tensors of the call.
inline AttentionBatch checked_batch(const TensorView& query_indptr, const TensorView& page_indptr,
                                    const TensorView& page_indices, const TensorView& seq_lens,
                                    const Optional<TensorView>& mask, const Optional<TensorView>& mask_indptr,
                                    int64_t page_size, int64_t num_q_heads, int64_t num_kv_heads, int64_t num_tokens,
                                    int64_t num_pages, bool causal, int64_t window_left) {
  const AttentionBatch batch{data<int32_t>(query_indptr), data<int32_t>(page_indptr), data<int32_t>(page_indices),
                             data<int32_t>(seq_lens),     seq_lens.size(0),           page_size,
                             num_q_heads,                 num_kv_heads,               num_q_heads / num_kv_heads,
                             window_left,                 causal};
  for (const TensorView& array : {query_indptr, page_indptr, page_indices, seq_lens})
    if (!is_dtype(array, kDLInt, 32)) TVM_FFI_THROW(TypeError) << "the plan must have int32 arrays.";
  if (query_indptr.numel() != batch.num_seqs + 1 || page_indptr.numel() != batch.num_seqs + 1)
    TVM_FFI_THROW(ValueError) << "the plan must have indptr arrays of " << batch.num_seqs + 1 << " entries.";
  if (mask.has_value() != mask_indptr.has_value() || (mask_indptr.has_value() && mask_indptr.value().numel() < batch.num_seqs))
    TVM_FFI_THROW(ValueError) << "the plan must have a mask and its indptr, or neither.";
  check_batch(batch, num_tokens, page_indices.numel(), num_pages, mask.has_value() ? mask.value().numel() : 0,
              data_or_null<int64_t>(mask_indptr));
  return batch;
}

/// Runs `call`, whose `work` is set here: from the plan, or made now.
inline void attend(Call& call, Dtype page_dtype, const Optional<TensorView>& work, int64_t num_threads) {
  std::vector<int64_t> made;
  if (work.has_value() && !is_dtype(work.value(), kDLInt, 64)) TVM_FFI_THROW(TypeError) << "the plan must have int64 work.";
  num_threads = std::max<int64_t>(1, num_threads);
  if (!work.has_value()) made = divide_attention(call.batch, num_threads);
  call.work = work.has_value() ? AttentionWork::read(data<int64_t>(work.value()), work.value().numel(), call.batch)
                               : AttentionWork::read(made.data(), static_cast<int64_t>(made.size()), call.batch);
  const auto padded = [](int64_t dim) { return (dim + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; };
  call.padded_dim = padded(call.key_dim + call.tail_dim);
  call.padded_value_dim = padded(call.value_dim);
  with_page_type(page_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    call.rule.scale *= kUnit<T>;
    call.value_factor *= kUnit<T>;
    attend_as<T>(call, num_threads);
  });
}

}  // namespace pagedkv
