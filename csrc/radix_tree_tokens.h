#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

/// Token ids of 32 or 64 bits: how they are read, compared, hashed and kept.
namespace pagedkv {

/// Token ids that lie somewhere, all of one width.
struct TokenSpan {
  const void* start;
  bool is_wide;
  int64_t count;
};

/// Calls f with the first token of a span, as const int32_t* or const int64_t*.
template <typename F>
inline auto with_tokens(const void* start, bool is_wide, F f) {
  return is_wide ? f(static_cast<const int64_t*>(start)) : f(static_cast<const int32_t*>(start));
}

/// How many leading tokens are equal; the inner loop has no exit, so that it becomes vector code.
template <typename A, typename B>
inline int64_t common_prefix(const A* a, const B* b, int64_t count) {
  using Wider = std::conditional_t<(sizeof(A) > sizeof(B)), A, B>;
  constexpr int64_t kBlock = 64;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    Wider differs = 0;
    for (int64_t j = 0; j < kBlock; ++j) differs |= static_cast<Wider>(a[i + j]) ^ static_cast<Wider>(b[i + j]);
    if (differs != 0) break;
  }
  while (i < count && a[i] == b[i]) ++i;
  return i;
}

/// A hash of the tokens, the same for both widths. It only says where to look: tokens are always compared.
template <typename T>
inline uint32_t hash_tokens(const T* tokens, int64_t count, uint64_t seed) {
  const auto mix = [](uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  };
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15, kEven = 0xd1342543de82ef95;
  uint64_t left = seed, right = seed ^ kEven;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    left = mix(left ^ static_cast<uint64_t>(tokens[i]), kOdd ^ static_cast<uint64_t>(tokens[i + 1]));
    right = mix(right ^ static_cast<uint64_t>(tokens[i + 2]), kEven ^ static_cast<uint64_t>(tokens[i + 3]));
  }
  for (; i < count; ++i) left = mix(left ^ static_cast<uint64_t>(tokens[i]), kOdd);
  const uint64_t hash = mix(left ^ kEven, right ^ kOdd);
  return static_cast<uint32_t>(hash ^ (hash >> 32));
}

/// The buffer with room for `count` elements, perhaps elsewhere.
template <typename T>
T* resized(T* buffer, int64_t count) {
  if (count == 0) {
    std::free(buffer);
    return nullptr;
  }
  void* moved = std::realloc(static_cast<void*>(buffer), static_cast<size_t>(count) * sizeof(T));
  if (moved == nullptr) throw std::bad_alloc();
  return static_cast<T*>(moved);
}

/// A run of whole pages with their tokens, which are kept in 32 bits while all of them fit. Memory is exact when the run is
/// made, with up to a sixteenth to spare once it grew or shrank.
class PageRun {
 public:
  PageRun() = default;
  PageRun(const PageRun&) = delete;
  PageRun& operator=(const PageRun&) = delete;
  PageRun(PageRun&& other) noexcept { swap(other); }
  PageRun& operator=(PageRun&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PageRun() { clear(); }

  int64_t num_pages() const { return num_pages_; }
  bool is_wide() const { return is_wide_; }
  const void* tokens() const { return tokens_; }
  const int32_t* pages() const { return pages_; }
  const void* tokens_at(int64_t index) const { return static_cast<const char*>(tokens_) + index * width(); }
  int64_t num_bytes(int64_t page_size) const { return capacity_ * (page_size * width() + int64_t{4}); }

  /// Adds pages at the end, with `page_size` tokens each.
  template <typename T>
  void append(const T* tokens, const int32_t* pages, int64_t num_pages, int64_t page_size) {
    const int64_t needed = num_pages_ + num_pages, old_tokens = num_pages_ * page_size;
    if (!is_wide_ && needs_64_bits(tokens, num_pages * page_size)) widen(page_size);
    if (needed > capacity_) reserve(num_pages_ == 0 ? needed : needed + needed / 16, page_size);
    const auto copy = [&](auto* to) {
      using Stored = std::remove_reference_t<decltype(*to)>;
      for (int64_t i = 0; i < num_pages * page_size; ++i) to[i] = static_cast<Stored>(tokens[i]);
    };
    if (is_wide_) {
      copy(static_cast<int64_t*>(tokens_) + old_tokens);
    } else {
      copy(static_cast<int32_t*>(tokens_) + old_tokens);
    }
    std::memcpy(pages_ + num_pages_, pages, static_cast<size_t>(num_pages) * 4);
    num_pages_ = static_cast<int32_t>(needed);
  }

  /// Keeps the first pages.
  void truncate(int64_t num_pages, int64_t page_size) {
    num_pages_ = static_cast<int32_t>(num_pages);
    if (num_pages < capacity_ - capacity_ / 16) reserve(num_pages, page_size);
  }

  /// Drops the first pages; what is left gets memory of its own.
  void drop_front(int64_t num_pages, int64_t page_size) {
    PageRun rest;
    with_tokens(tokens_at(num_pages * page_size), is_wide_, [&](const auto* tokens) {
      rest.append(tokens, pages_ + num_pages, num_pages_ - num_pages, page_size);
    });
    swap(rest);
  }

  void clear() {
    std::free(tokens_);
    std::free(pages_);
    tokens_ = nullptr;
    pages_ = nullptr;
    num_pages_ = capacity_ = 0;
    is_wide_ = false;
  }

 private:
  int64_t width() const { return is_wide_ ? 8 : 4; }

  template <typename T>
  static bool needs_64_bits(const T* tokens, int64_t count) {
    if (sizeof(T) == 4) return false;
    int64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<int64_t>(tokens[i]);
    return bits > INT32_MAX;
  }

  void widen(int64_t page_size) {
    const int64_t count = num_pages_ * page_size;
    auto* wide = capacity_ == 0 ? nullptr : resized<int64_t>(nullptr, capacity_ * page_size);
    for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<const int32_t*>(tokens_)[i];
    std::free(tokens_);
    tokens_ = wide;
    is_wide_ = true;
  }

  void reserve(int64_t num_pages, int64_t page_size) {
    tokens_ = resized(static_cast<char*>(tokens_), num_pages * page_size * width());
    pages_ = resized(pages_, num_pages);
    capacity_ = static_cast<int32_t>(num_pages);
  }

  void swap(PageRun& other) noexcept {
    std::swap(tokens_, other.tokens_);
    std::swap(pages_, other.pages_);
    std::swap(num_pages_, other.num_pages_);
    std::swap(capacity_, other.capacity_);
    std::swap(is_wide_, other.is_wide_);
  }

  void* tokens_ = nullptr;
  int32_t* pages_ = nullptr;
  int32_t num_pages_ = 0, capacity_ = 0;
  bool is_wide_ = false;
};

}  // namespace pagedkv
