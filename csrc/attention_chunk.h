#pragma once

#include "attention_call.h"
#include "attention_tiles.h"

#include <algorithm>

/// Where the rows of one chunk of keys lie, and their scales.
namespace pagedkv {

/// Tokens between the start of a load and its use when pages are read in place.
constexpr int kTokensAhead = 12;
/// Tokens unpacked at a time: K or V of 128 columns then fit the nearest caches.
constexpr int kPackedBlock = 64;
/// Floats between two unpacked rows: rows a power of two apart would meet in the same few sets of the cache.
constexpr int kUnpackedPad = 16;
/// Entries of a list of rows beyond its last: what is read after it, for loads that start ahead.
constexpr int kLead = kPackedBlock;

/// Addresses of tokens [first, last) of one chunk, before the head's offset.
template <typename T>
struct ChunkRows {
  const T* key[kChunkTokens + kLead];
  const T* tail[kChunkTokens];
  const T* value[kChunkTokens + kLead];
  int first = 0, last = 0;

  bool empty() const { return first >= last; }

  /// The tokens of a chunk that lie in `tokens` (numbered from the chunk's start) and in pages of the sequence.
  void collect(const Call& call, int64_t sequence, int64_t chunk, KeyRange tokens) {
    const int64_t start = chunk * kChunkTokens, size = call.batch.page_size;
    const int32_t* pages = call.batch.page_indices + call.batch.page_indptr[sequence];
    const int64_t held = (call.batch.page_indptr[sequence + 1] - call.batch.page_indptr[sequence]) * size - start;
    first = static_cast<int>(std::max(tokens.first, int64_t{0}));
    last = static_cast<int>(std::min({tokens.last, held, int64_t{kChunkTokens}}));
    if (first >= last) {
      first = last = 0;
      return;
    }
    int64_t page = (start + first) / size, offset = (start + first) % size;
    for (int t = first; t < last;) {
      const int run = static_cast<int>(std::min<int64_t>(last - t, size - offset));
      const T *k = call.keys.at<T>(pages[page], offset), *v = call.values.at<T>(pages[page], offset);
      for (int i = 0; i < run; ++i) {
        key[t + i] = k + i * call.keys.offset_stride;
        value[t + i] = v + i * call.values.offset_stride;
      }
      if (call.tail_dim > 0) {
        const T* r = call.tails.at<T>(pages[page], offset);
        for (int i = 0; i < run; ++i) tail[t + i] = r + i * call.tails.offset_stride;
      }
      t += run, ++page, offset = 0;
    }
  }

  /// After the keys come `after_keys`, after the values `after_values`: both from their first entry on, each as far as it goes.
  void lead_to(const T* const* after_keys, int num_after_keys, const T* const* after_values, int num_after_values) {
    if (empty()) return;
    fill_lead(key, after_keys, num_after_keys);
    fill_lead(value, after_values, num_after_values);
  }

  ListedRows<T> keys(const Call& call, int64_t head, int lead = 0) const {
    return {key, head * call.keys.head_stride, lead};
  }
  ListedRows<T> values(const Call& call, int64_t head, int lead = 0) const {
    return {value, head * call.values.head_stride, lead};
  }
  ListedRows<T> tails(const Call& call, int64_t head) const { return {tail, head * call.tails.head_stride}; }

 private:
  void fill_lead(const T** rows, const T* const* after, int num_after) const {
    const int num = std::min(num_after, kLead);
    std::copy(after, after + num, rows + last);
    std::fill(rows + last + num, rows + last + kLead, rows[last + num - 1]);
  }
};

/// Copies the scales of tokens [first, last) of a chunk and head.
inline void copy_scales(const Scales& scales, const AttentionBatch& batch, int64_t sequence, int64_t chunk, int64_t head,
                        int first, int last, float* result) {
  const int32_t* pages = batch.page_indices + batch.page_indptr[sequence];
  const int64_t size = batch.page_size;
  int64_t page = (chunk * kChunkTokens + first) / size, offset = (chunk * kChunkTokens + first) % size;
  for (int t = first; t < last;) {
    const int run = static_cast<int>(std::min<int64_t>(last - t, size - offset));
    const float* source =
        scales.start + pages[page] * scales.page_stride + head * scales.head_stride + offset * scales.offset_stride;
    for (int i = 0; i < run; ++i) result[t + i] = source[i * scales.offset_stride];
    t += run, ++page, offset = 0;
  }
}

/// Unpacks rows [first, last) to contiguous float32, `stride` apart, zeros up to whole vectors.
template <typename T>
inline void unpack_rows(const ListedRows<T>& rows, int first, int last, int64_t dim, float* target, int64_t stride) {
  constexpr int W = Vec::kLanes;
  for (int t = first; t < last; ++t, target += stride) {
    const T* source = rows(t);
    int64_t d = 0;
    for (; d + W <= dim; d += W) store(target + d, load(source + d));
    if (d < dim) store(target + d, load_lower(source + d));
  }
}

}  // namespace pagedkv
