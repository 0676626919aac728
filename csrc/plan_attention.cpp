#include "attend.h"

#include <cstdlib>

namespace pagedkv {
namespace {

struct HostMemory {
  void AllocData(DLTensor* tensor) { tensor->data = std::malloc(tvm::ffi::GetDataSize(*tensor)); }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

}  // namespace

/// Cuts a batch into work for `num_threads` threads: int64 [n], to be passed to any number of attention calls.
tvm::ffi::Tensor plan_attention(TensorView query_indptr, TensorView page_indptr, TensorView page_indices,
                                TensorView seq_lens, int64_t page_size, int64_t num_q_heads, int64_t num_kv_heads,
                                bool causal, int64_t window_left, int64_t num_threads) {
  const int64_t num_tokens = data<int32_t>(query_indptr)[query_indptr.numel() - 1];
  const AttentionBatch batch =
      checked_batch(query_indptr, page_indptr, page_indices, seq_lens, Optional<TensorView>(), Optional<TensorView>(), page_size,
                    num_q_heads, num_kv_heads, num_tokens, int64_t{1} << 31, causal, window_left);
  const std::vector<int64_t> work = divide_attention(batch, std::max<int64_t>(1, num_threads));
  const int64_t length = static_cast<int64_t>(work.size());
  tvm::ffi::Tensor result = tvm::ffi::Tensor::FromNDAlloc(HostMemory(), {length}, DLDataType{kDLInt, 64, 1}, DLDevice{kDLCPU, 0});
  std::copy(work.begin(), work.end(), static_cast<int64_t*>(result.data_ptr()));
  return result;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_attention, plan_attention);

}  // namespace pagedkv
