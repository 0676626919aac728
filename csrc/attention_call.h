#pragma once

#include "attention_rows.h"
#include "attention_work.h"
#include "exp_table.h"
#include "tensor.h"

#include <algorithm>
#include <type_traits>

/// One attention call as all threads see it.
namespace pagedkv {

enum class Dtype { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8E4M3, kFloat8E5M2 };

inline Dtype dtype_of(const TensorView& tensor) {
  if (is_dtype(tensor, kDLFloat, 32)) return Dtype::kFloat32;
  if (is_dtype(tensor, kDLFloat, 16)) return Dtype::kFloat16;
  if (is_dtype(tensor, kDLBfloat, 16)) return Dtype::kBFloat16;
  if (is_dtype(tensor, kDLInt, 8)) return Dtype::kInt8;
  if (is_dtype(tensor, kDLFloat8_e4m3fn, 8)) return Dtype::kFloat8E4M3;
  if (is_dtype(tensor, kDLFloat8_e5m2, 8)) return Dtype::kFloat8E5M2;
  TVM_FFI_THROW(TypeError) << "attention takes float32, float16, bfloat16, int8, float8_e4m3fn and float8_e5m2.";
  return Dtype::kFloat32;
}

/// Calls `body` with a null pointer of the C++ type of a float dtype.
template <typename Body>
void with_float_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(static_cast<float*>(nullptr));
    case Dtype::kFloat16: return body(static_cast<Half*>(nullptr));
    case Dtype::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    default: TVM_FFI_THROW(TypeError) << "query and out must have dtype float32, float16 or bfloat16.";
  }
}

/// The same for any dtype of pages.
template <typename Body>
void with_page_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kInt8: return body(static_cast<int8_t*>(nullptr));
    case Dtype::kFloat8E4M3: return body(static_cast<Float8E4M3*>(nullptr));
    case Dtype::kFloat8E5M2: return body(static_cast<Float8E5M2*>(nullptr));
    default: return with_float_type(dtype, body);
  }
}

/// Pages [N, P, Hk, D] of any strides but the last, in elements.
struct Pages {
  template <typename T>
  const T* at(int64_t page, int64_t offset) const {
    return reinterpret_cast<const T*>(start) + page * page_stride + offset * offset_stride;
  }

  const char* start = nullptr;
  int64_t page_stride = 0, offset_stride = 0, head_stride = 0;
};

/// Float32 scales [N, Hk, P] of any strides, one a token and head; none: all are 1.
struct Scales {
  const float* start = nullptr;
  int64_t page_stride = 0, head_stride = 0, offset_stride = 0;
};

/// Angles by position: cos and sin of `half` pairs of columns each; none: keys are as they were stored.
struct Rotation {
  const float* table = nullptr;
  int64_t half = 0;
  bool interleaved = false;
};

/// One call: what all threads read, and where they write. A key row is `key_dim` columns of `keys`, then `tail_dim` of `tails`.
struct Call {
  AttentionBatch batch;
  LogitRule rule;
  float value_factor;
  Dtype query_dtype, out_dtype;
  const void *query, *query_tail;
  int64_t query_token_stride, query_head_stride, tail_token_stride, tail_head_stride;
  Pages keys, tails, values;
  int64_t key_dim, tail_dim, value_dim;
  Scales key_scales, value_scales;
  Rotation rotation;
  ExpTable exp_table;
  void* out;
  float* lse;
  const float *sinks, *alibi_slopes;
  const uint8_t* mask;
  const int64_t* mask_indptr;
  AttentionWork work;
  int64_t padded_dim, padded_value_dim;  // whole vectors
  RowState* chunk_states = nullptr;      // of tiles that several items compute
  float* chunk_totals = nullptr;

  /// Whether key rows exist in memory as the products take them.
  bool keys_need_unpacking() const { return tail_dim > 0 || rotation.table; }
};

/// cos and sin of a pair at a position that may be negative.
inline void rotate(const Rotation& rotation, int64_t position, float* row) {
  const float* angles = rotation.table + (position < 0 ? -position : position) * rotation.half * 2;
  const float sign = position < 0 ? -1.0f : 1.0f;
  for (int64_t i = 0; i < rotation.half; ++i) {
    float &a = row[rotation.interleaved ? 2 * i : i], &b = row[rotation.interleaved ? 2 * i + 1 : i + rotation.half];
    const float cosine = angles[2 * i], sine = sign * angles[2 * i + 1], x = a, y = b;
    a = x * cosine - y * sine;
    b = y * cosine + x * sine;
  }
}

/// One query row in float32, rotated to its position, zeros up to whole vectors.
inline void load_query_row(const Call& call, int64_t token, int64_t head, int64_t position, float* row) {
  with_float_type(call.query_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* source = static_cast<const T*>(call.query) + token * call.query_token_stride + head * call.query_head_stride;
    for (int64_t d = 0; d < call.key_dim; ++d) row[d] = to_float(source[d]);
    source = static_cast<const T*>(call.query_tail) + token * call.tail_token_stride + head * call.tail_head_stride;
    for (int64_t d = 0; d < call.tail_dim; ++d) row[call.key_dim + d] = to_float(source[d]);
  });
  std::fill(row + call.key_dim + call.tail_dim, row + call.padded_dim, 0.0f);
  if (call.rotation.table) rotate(call.rotation, position, row);
}

/// Writes the result of a row and its log-sum-exp where asked for.
inline void finish_row(const Call& call, const RowState& state, const float* total, int64_t token, int64_t head) {
  const int64_t dim = call.value_dim, row = token * call.batch.num_q_heads + head;
  if (call.lse) call.lse[row] = log_sum(state);
  with_float_type(call.out_dtype, [&](auto* type) {
    store_result(state, total, call.value_factor, dim, static_cast<decltype(type)>(call.out) + row * dim);
  });
}

}  // namespace pagedkv
