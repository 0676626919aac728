#pragma once

#include "tensor.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/// What the ops that move bytes share: copying runs, and how many threads a move is worth.
namespace pagedkv {

/// Moves of at least this many bytes bypass the caches: they would push out more than they leave to be read again, and a
/// plain store first reads the line that it overwrites.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

/// A thread more than one a 64 KiB costs more to wake than it saves.
inline int num_workers(int64_t num_bytes, int64_t num_threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min(num_threads, num_bytes >> 16)));
}

/// Copies one run of bytes; with `streamed` and whole aligned lines, past the caches (call `end_stream` afterwards).
inline void copy_run(char* dst, const char* src, int64_t num_bytes, bool streamed) {
#if defined(__x86_64__)
  if (streamed && ((reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(num_bytes)) & 63) == 0) {
    for (int64_t i = 0; i < num_bytes; i += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
#elif defined(__AVX__)
      const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
      const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), low);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 32), high);
#else
      __m128i line[4];
      for (int j = 0; j < 4; ++j) line[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 16 * j));
      for (int j = 0; j < 4; ++j) _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 16 * j), line[j]);
#endif
    }
    return;
  }
#else
  (void)streamed;
#endif
  std::memcpy(dst, src, static_cast<size_t>(num_bytes));
}

/// Orders streamed stores before whatever the caller does next; each thread that streamed calls it.
inline void end_stream(bool streamed) {
#if defined(__x86_64__)
  if (streamed) _mm_sfence();
#else
  (void)streamed;
#endif
}

/// The heads of one token on one side of a move.
struct TokenRow {
  char* start;
  int64_t head_stride;
};

/// Starts the load of the first lines of a row that is copied next: hardware prefetchers do not follow a page table.
inline void prefetch_token(TokenRow row, int64_t heads, int64_t row_bytes) {
  const bool whole = row.head_stride == row_bytes;
  const int64_t num_bytes = std::min<int64_t>(whole ? heads * row_bytes : row_bytes, 512);
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(row.start + i);
}

/// Copies [heads, row_bytes]; heads that lie side by side on both sides go as one run.
inline void copy_token(TokenRow dst, TokenRow src, int64_t heads, int64_t row_bytes, bool streamed) {
  if (dst.head_stride == row_bytes && src.head_stride == row_bytes) {
    copy_run(dst.start, src.start, heads * row_bytes, streamed);
    return;
  }
  for (int64_t head = 0; head < heads; ++head) {
    copy_run(dst.start + head * dst.head_stride, src.start + head * src.head_stride, row_bytes, streamed);
  }
}

/// Pages [N, P, Hk, D] in NHD order of any strides, addressed by slot.
struct SlotPages {
  explicit SlotPages(const TensorView& pages)
      : start(data<char>(pages)),
        page_size(pages.size(1)),
        heads(pages.size(2)),
        row_bytes(pages.size(3) * item_bytes(pages)),
        page_stride(stride_bytes(pages, 0)),
        offset_stride(stride_bytes(pages, 1)),
        head_stride(stride_bytes(pages, 2)) {}

  TokenRow at(int64_t slot) const {
    const int64_t page = slot / page_size;
    return {start + page * page_stride + (slot - page * page_size) * offset_stride, head_stride};
  }

  char* start;
  int64_t page_size, heads, row_bytes, page_stride, offset_stride, head_stride;
};

/// Tokens [T, Hk, D] of any strides.
struct TokenRows {
  explicit TokenRows(const TensorView& tokens)
      : start(data<char>(tokens)), token_stride(stride_bytes(tokens, 0)), head_stride(stride_bytes(tokens, 1)) {}

  TokenRow at(int64_t token) const { return {start + token * token_stride, head_stride}; }

  char* start;
  int64_t token_stride, head_stride;
};

/// One-dimensional int64 indices of any stride.
struct Indices {
  explicit Indices(const TensorView& indices)
      : start(data<const int64_t>(indices)), count(indices.size(0)), stride(indices.strides()[0]) {}

  int64_t operator[](int64_t i) const { return start[i * stride]; }

  const int64_t* start;
  int64_t count, stride;
};

/// Refuses a slot of [num_slots, ...) before anything moves; negative slots mean "skip" and pass.
inline void check_slots(const char* name, const Indices& slots, int64_t num_slots) {
  int64_t highest = -1;
  for (int64_t i = 0; i < slots.count; ++i) highest = std::max(highest, slots[i]);
  if (highest < num_slots) return;
  int64_t entry = 0;
  while (slots[entry] < num_slots) ++entry;
  TVM_FFI_THROW(ValueError) << name << " must be below " << num_slots << " (N * P slots), got " << slots[entry]
                            << " at entry " << entry << ".";
}

}  // namespace pagedkv
