#pragma once

#include "attention_rows.h"
#include "attention_work.h"
#include "tensor.h"

#include <algorithm>
#include <type_traits>

/// One attention call as all threads see it, and where the rows of a chunk of keys lie.
namespace pagedkv {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

inline Dtype dtype_of(const TensorView& tensor) {
  if (is_dtype(tensor, kDLFloat, 32)) return Dtype::kFloat32;
  if (is_dtype(tensor, kDLFloat, 16)) return Dtype::kFloat16;
  if (is_dtype(tensor, kDLBfloat, 16)) return Dtype::kBFloat16;
  TVM_FFI_THROW(TypeError) << "query and pages must have dtype float32, float16 or bfloat16.";
  return Dtype::kFloat32;
}

/// Calls `body` with a null pointer of the dtype's C++ type.
template <typename Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(static_cast<float*>(nullptr));
    case Dtype::kFloat16: return body(static_cast<Half*>(nullptr));
    case Dtype::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
  }
}

/// Pages [N, P, Hk, D] of any strides but the last, in elements.
struct Pages {
  explicit Pages(const TensorView& pages)
      : start(data<char>(pages)),
        page_stride(pages.strides()[0]),
        offset_stride(pages.strides()[1]),
        head_stride(pages.strides()[2]) {}

  template <typename T>
  const T* at(int64_t page, int64_t offset) const {
    return reinterpret_cast<const T*>(start) + page * page_stride + offset * offset_stride;
  }

  const char* start;
  int64_t page_stride, offset_stride, head_stride;
};

/// One call: what all threads read, and where they write.
struct Call {
  AttentionBatch batch;
  LogitRule rule;
  Dtype query_dtype;
  const void* query;
  int64_t query_token_stride, query_head_stride;
  Pages keys, values;
  void* out;
  float* lse;
  const float* sinks;
  const float* alibi_slopes;
  const uint8_t* mask;
  const int64_t* mask_indptr;
  int64_t padded_dim, padded_value_dim;  // whole vectors
  RowState* chunk_states = nullptr;      // of split tiles
  float* chunk_totals = nullptr;
};

inline void finish(const Call& call, const RowState& state, const float* total, int64_t token, int64_t head) {
  const int64_t dim = call.batch.value_dim, row = token * call.batch.num_q_heads + head;
  float* lse = call.lse ? call.lse + row : nullptr;
  with_type(call.query_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    finish_row(state, total, dim, static_cast<T*>(call.out) + row * dim, lse);
  });
}

inline void load_query_row(const Call& call, int64_t token, int64_t head, float* row) {
  const int64_t offset = token * call.query_token_stride + head * call.query_head_stride, dim = call.batch.head_dim;
  with_type(call.query_dtype, [&](auto* type) {
    const auto* source = static_cast<std::remove_pointer_t<decltype(type)> const*>(call.query) + offset;
    for (int64_t d = 0; d < dim; ++d) row[d] = to_float(source[d]);
  });
  std::fill(row + dim, row + call.padded_dim, 0.0f);
}

/// Tokens of one head between two heads of a chunk, when pages are read in place: 8 KiB with 128 columns.
template <typename T>
constexpr int kDirectBlock = 64 / sizeof(T);

/// Where each token of one chunk lies, before the head's offset. Entries beside the visible tokens repeat a visible one, so that
/// tiles may run over without reading what is not the sequence's.
template <typename T>
struct ChunkRows {
  static constexpr int kBlock = kDirectBlock<T>;
  const T* key[kChunkTokens];
  const T* value[kChunkTokens];
  int first = 0, last = 0;

  void collect(const Call& call, int64_t sequence, int64_t chunk, KeyRange visible) {
    const int64_t start = chunk * kChunkTokens, size = call.batch.page_size;
    first = static_cast<int>(std::max(visible.first - start, int64_t{0}));
    last = static_cast<int>(std::min(visible.last - start, int64_t{kChunkTokens}));
    if (first >= last) return;
    const int32_t* pages = call.batch.page_indices + call.batch.page_indptr[sequence];
    int64_t page = (start + first) / size, offset = (start + first) % size;
    for (int t = first; t < last; ++t) {
      key[t] = call.keys.at<T>(pages[page], offset);
      value[t] = call.values.at<T>(pages[page], offset);
      if (++offset == size) offset = 0, ++page;
    }
    for (int t = first & ~(kBlock - 1); t < first; ++t) key[t] = key[first], value[t] = value[first];
    for (int t = last; t % kBlock; ++t) key[t] = key[last - 1], value[t] = value[last - 1];
  }
};

}  // namespace pagedkv
