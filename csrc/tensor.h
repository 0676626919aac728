#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>

/// Typed access to tensors that Python has already checked (shape, dtype, device, contiguous last dim).
namespace pagedkv {

using tvm::ffi::TensorView;

/// First element, the byte offset of the view included. Tensors that only stand for others, and those whose memory was taken
/// away, have elements and no address.
template <typename T>
inline T* data(const TensorView& tensor) {
  if (tensor.data_ptr() == nullptr && tensor.numel() > 0)
    TVM_FFI_THROW(ValueError) << "tensors must have memory, got one of " << tensor.numel() << " elements without an address.";
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

inline int64_t item_bytes(const TensorView& tensor) { return (tensor.dtype().bits * tensor.dtype().lanes + 7) / 8; }

inline int64_t stride_bytes(const TensorView& tensor, int dim) { return tensor.strides()[dim] * item_bytes(tensor); }

inline bool is_dtype(const TensorView& tensor, uint8_t code, int bits) {
  return tensor.dtype().code == code && tensor.dtype().bits == bits;
}

/// Whether the address ranges of two tensors meet; interleaved views of one buffer do, without sharing a byte.
inline bool ranges_meet(const TensorView& a, const TensorView& b) {
  const auto last = [](const TensorView& tensor) {
    int64_t offset = item_bytes(tensor);
    for (int dim = 0; dim < tensor.ndim(); ++dim) offset += (tensor.size(dim) - 1) * stride_bytes(tensor, dim);
    return data<const char>(tensor) + offset;
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  return data<const char>(a) < last(b) && data<const char>(b) < last(a);
}

}  // namespace pagedkv
