#include "quantize.h"

namespace pagedkv {

/// Fills contiguous values [T, Hk, D] and scales [T, Hk] from x of any strides, last dim contiguous.
void quantize_kv(TensorView x, TensorView values, TensorView scales, int64_t num_threads) {
  const QuantizeToken quantize = quantize_token_between(x, values);
  const TokenRows tokens(x);
  const int64_t count = x.size(0), heads = x.size(1), dim = x.size(2);
  char* const to = data<char>(values);
  float* const scale = data<float>(scales);
#pragma omp parallel for schedule(static) num_threads(num_workers(x.numel() * item_bytes(x), num_threads))
  for (int64_t i = 0; i < count; ++i) {
    quantize(tokens.at(i), {to + i * heads * dim, dim}, heads, dim, scale + i * heads);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_kv, quantize_kv);

}  // namespace pagedkv
