#include <tvm/ffi/function.h>

#include <algorithm>

#include "tensor.h"

namespace pagedkv {

/// Writes flat[starts[i] : starts[i] + indptr[i + 1] - indptr[i]] one behind the other, with 0 for what is below 0.
/// Shapes: flat [F] int32; starts [S] int64; indptr [S + 1] int32; values [indptr[S]] int32.
void gather_rows(TensorView flat, TensorView starts, TensorView indptr, TensorView values) {
  const int32_t* from = data<int32_t>(flat);
  const int64_t* start = data<int64_t>(starts);
  const int32_t* bounds = data<int32_t>(indptr);
  int32_t* to = data<int32_t>(values);
  const int64_t num_rows = starts.numel();
  if (indptr.numel() != num_rows + 1 || bounds[0] != 0 || bounds[num_rows] != values.numel())
    TVM_FFI_THROW(ValueError) << "values must have room for the rows, got " << values.numel() << " entries.";
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t size = int64_t{bounds[i + 1]} - bounds[i];
    if (size < 0 || bounds[i + 1] > values.numel() || start[i] < 0 || start[i] + size > flat.numel())
      TVM_FFI_THROW(ValueError) << "rows must lie in flat, got row " << i << " of " << size << " entries.";
    // Addresses of this row alone: read again for each entry, the loop would not become vector code.
    const int32_t* entries = from + start[i];
    int32_t* row = to + bounds[i];
    for (int64_t j = 0; j < size; ++j) row[j] = std::max(entries[j], 0);
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_rows, gather_rows);

}  // namespace pagedkv
