#include "attention_worker.h"

#include <tvm/ffi/optional.h>

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pagedkv {
namespace {

using tvm::ffi::Optional;

/// Folds the chunks of row `row` of a split tile, in order.
void merge_split(const Call& call, const SplitTile& split, int64_t row, float* total) {
  const AttentionItem& tile = split.tile;
  const int64_t dim = call.padded_value_dim, group = call.batch.group;
  const int64_t rows_a_head = (tile.token_last - tile.token_first) * group;
  RowState state;
  for (int64_t chunk = tile.chunk_first; chunk < tile.chunk_last; ++chunk) {
    const int64_t slot = tile.state + (chunk - tile.chunk_first) * split.rows + row;
    fold_chunk(state, total, call.chunk_states[slot], call.chunk_totals + slot * dim, dim);
  }
  const int64_t token = call.batch.query_indptr[tile.sequence] + tile.token_first + row % rows_a_head / group;
  const int64_t head = (tile.head_first + row / rows_a_head) * group + row % group;
  if (call.sinks) fold_sink(state, total, call.sinks[head], dim);
  finish(call, state, total, token, head);
}

template <typename T>
void attend(Call call, int64_t num_threads) {
  const AttentionWork work = divide_attention(call.batch, num_threads);
  if (work.items.empty()) return;
  const int64_t num_items = static_cast<int64_t>(work.items.size());
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min(num_threads, num_items)));
  const int64_t floats = Worker<T>::num_floats(call, work.most_rows);
  Carver sizes(nullptr);
  sizes.take<RowState>(work.num_states);
  sizes.take<float>(work.num_states * call.padded_value_dim);
  Carver carver(thread_scratch(floats * workers + sizes.num_floats()));
  call.chunk_states = carver.take<RowState>(work.num_states);
  call.chunk_totals = carver.take<float>(work.num_states * call.padded_value_dim);
  float* scratch = carver.take<float>(floats * workers);
  std::atomic<int64_t> taken{0};
  const auto work_off = [&](int worker_number) {
    Worker<T> worker(call, work.most_rows, scratch + worker_number * floats);
    for (int64_t i = taken++; i < num_items; i = taken++) worker.run(work.items[i]);
  };
  const auto merge_off = [&](int worker_number) {
    float* total = scratch + worker_number * floats;
    for (const SplitTile& split : work.splits)
      for (int64_t row = worker_number; row < split.rows; row += workers) merge_split(call, split, row, total);
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
void check_batch(const AttentionBatch& batch, int64_t num_tokens, int64_t num_indices, int64_t num_pages,
                 int64_t mask_size, const int64_t* mask_indptr) {
  const auto refuse = [](const char* what, int64_t sequence) {
    TVM_FFI_THROW(ValueError) << "the plan must be as plan_attention made it, got " << what << " at sequence " << sequence
                              << ". Its arrays were changed, or it was made by hand.";
  };
  if (batch.query_indptr[0] != 0 || batch.page_indptr[0] != 0) refuse("an indptr that does not start with 0", 0);
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t q_len = int64_t{batch.query_indptr[s + 1]} - batch.query_indptr[s], kv_len = batch.seq_lens[s];
    if (q_len < 0) refuse("a query_indptr that decreases", s);
    const int64_t first = batch.page_indptr[s], last = batch.page_indptr[s + 1];
    if (first > last || last > num_indices) refuse("a page_indptr outside page_indices", s);
    if (kv_len < 0 || kv_len > (last - first) * batch.page_size) refuse("a length its pages cannot hold", s);
    for (int64_t i = first; i < last; ++i)
      if (batch.page_indices[i] < 0 || batch.page_indices[i] >= num_pages) refuse("a page id outside the pool", s);
    if (mask_indptr && (mask_indptr[s] < 0 || mask_indptr[s] + q_len * kv_len > mask_size)) refuse("a mask too short", s);
  }
  if (batch.query_indptr[batch.num_seqs] != num_tokens) refuse("another number of query rows", batch.num_seqs);
}

template <typename T>
const T* data_or_null(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? data<const T>(tensor.value()) : nullptr;
}

}  // namespace

/// Attention of each sequence's new tokens over its pages (NHD order, any strides but the last); fills out and lse.
/// A row's bits depend on its sequence alone: not on the batch, the pages, the split of query rows or the threads.
void paged_attention(TensorView query, TensorView key_pages, TensorView value_pages, TensorView query_indptr,
                     TensorView page_indptr, TensorView page_indices, TensorView seq_lens, bool causal,
                     int64_t window_left, double sm_scale, double soft_cap, Optional<TensorView> sinks,
                     Optional<TensorView> alibi_slopes, Optional<TensorView> mask, Optional<TensorView> mask_indptr,
                     TensorView out, Optional<TensorView> lse, int64_t num_threads) {
  if (dtype_of(key_pages) != dtype_of(value_pages)) TVM_FFI_THROW(TypeError) << "keys and values must have one dtype.";
  if (key_pages.size(3) % 8 || value_pages.size(3) % 8)
    TVM_FFI_THROW(ValueError) << "head dims must be multiples of 8, got " << key_pages.size(3) << " and "
                              << value_pages.size(3) << ".";
  AttentionBatch batch{data<int32_t>(query_indptr), data<int32_t>(page_indptr), data<int32_t>(page_indices),
                       data<int32_t>(seq_lens), seq_lens.size(0), key_pages.size(1), query.size(1), key_pages.size(2),
                       query.size(1) / key_pages.size(2), key_pages.size(3), value_pages.size(3), window_left, causal};
  if (query_indptr.numel() != batch.num_seqs + 1 || page_indptr.numel() != batch.num_seqs + 1)
    TVM_FFI_THROW(ValueError) << "the plan must have indptr arrays of " << batch.num_seqs + 1 << " entries.";
  check_batch(batch, query.size(0), page_indices.numel(), std::min(key_pages.size(0), value_pages.size(0)),
              mask.has_value() ? mask.value().numel() : 0, data_or_null<int64_t>(mask_indptr));
  const auto padded = [](int64_t dim) { return (dim + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; };
  const Call call{batch,
                  {static_cast<float>(sm_scale), static_cast<float>(soft_cap)},
                  dtype_of(query),
                  data<char>(query),
                  query.strides()[0],
                  query.strides()[1],
                  Pages(key_pages),
                  Pages(value_pages),
                  data<char>(out),
                  const_cast<float*>(data_or_null<float>(lse)),
                  data_or_null<float>(sinks),
                  data_or_null<float>(alibi_slopes),
                  data_or_null<uint8_t>(mask),
                  data_or_null<int64_t>(mask_indptr),
                  padded(key_pages.size(3)),
                  padded(value_pages.size(3))};
  with_type(dtype_of(key_pages), [&](auto* type) {
    attend<std::remove_pointer_t<decltype(type)>>(call, std::max<int64_t>(1, num_threads));
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention);

}  // namespace pagedkv
