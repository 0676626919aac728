#include "attention_rows.h"
#include "scratch.h"
#include "tensor.h"

#include <algorithm>

namespace pagedkv {
namespace {

/// One output row: states are folded in from k = 0 up; those that saw no key are not even read.
template <typename T>
void merge_row(const T* values, int64_t state_stride, const float* lse, int64_t lse_stride, int64_t num_states,
               int64_t dim, float* total, T* out, float* out_lse) {
  float highest = kNoKey, sum = 0;
  std::fill(total, total + dim, 0.0f);
  for (int64_t k = 0; k < num_states; ++k) {
    const float logit = lse[k * lse_stride];
    if (logit == kNoKey) continue;
    const auto [larger, old_weight, new_weight] = weights_of(highest, logit);
    const T* value = values + k * state_stride;
    for (int64_t d = 0; d < dim; ++d) total[d] = total[d] * old_weight + to_float(value[d]) * new_weight;
    sum = sum * old_weight + new_weight;
    highest = larger;
  }
  const bool empty = sum == 0;
  for (int64_t d = 0; d < dim; ++d) store_as(out + d, empty ? 0.0f : total[d] / sum);
  *out_lse = empty ? kNoKey : highest + std::log(sum);
}

template <typename T>
void merge(const TensorView& values, const TensorView& lse, const TensorView& out, const TensorView& out_lse,
           int64_t num_threads) {
  const int64_t num_states = values.size(1), heads = values.size(2), dim = values.size(3);
  const int64_t num_rows = values.size(0) * heads;
  // A thread more than one a 16 Ki values costs more to wake than it saves.
  const int64_t useful = std::max<int64_t>(1, num_rows * num_states * dim >> 14);
  const int workers = static_cast<int>(std::max<int64_t>(1, std::min({num_threads, num_rows, useful})));
  const int64_t floats = (dim + 15) / 16 * 16;
  const Scratch memory(floats * workers);
  float* scratch = memory.start();
  const auto *value_strides = values.strides().data(), *lse_strides = lse.strides().data();
#pragma omp parallel for schedule(static, 1) num_threads(workers) if (workers > 1)
  for (int worker = 0; worker < workers; ++worker) {
    for (int64_t row = num_rows * worker / workers; row < num_rows * (worker + 1) / workers; ++row) {
      const int64_t token = row / heads, head = row % heads;
      merge_row(data<T>(values) + token * value_strides[0] + head * value_strides[2], value_strides[1],
                data<float>(lse) + token * lse_strides[0] + head * lse_strides[2], lse_strides[1], num_states, dim,
                scratch + worker * floats, data<T>(out) + row * dim, data<float>(out_lse) + row);
    }
  }
}

}  // namespace

/// Merges attention states [T, K, Hq, Dv] over disjoint keys; every stride of values but the last, and all of lse, are honoured.
void merge_states(TensorView values, TensorView lse, TensorView out, TensorView out_lse, int64_t num_threads) {
  if (is_dtype(values, kDLFloat, 32)) return merge<float>(values, lse, out, out_lse, num_threads);
  if (is_dtype(values, kDLFloat, 16)) return merge<Half>(values, lse, out, out_lse, num_threads);
  if (is_dtype(values, kDLBfloat, 16)) return merge<BFloat16>(values, lse, out, out_lse, num_threads);
  TVM_FFI_THROW(TypeError) << "values must have dtype float32, float16 or bfloat16.";
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_states, merge_states);

}  // namespace pagedkv
