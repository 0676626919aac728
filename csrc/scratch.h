#pragma once

#include <cstdint>
#include <memory>
#include <new>

/// Memory that outlives a call, so that a call per layer does not pay for fresh pages each time.
namespace pagedkv {

/// Floats on a cache line for the time of a call. The calling thread keeps one buffer of moderate size from call to call; what
/// a call needs beyond that is given back after it.
class Scratch {
 public:
  explicit Scratch(int64_t num_floats) {
    thread_local Buffer kept;
    thread_local int64_t capacity = 0;
    if (num_floats > kMostKept) {
      own_ = allocate(num_floats);
      start_ = own_.get();
      return;
    }
    if (num_floats > capacity) {
      capacity = 0;
      kept.reset();
      kept = allocate(num_floats);
      capacity = num_floats;
    }
    start_ = kept.get();
  }

  float* start() const { return start_; }

 private:
  static constexpr int64_t kMostKept = int64_t{16} << 20;

  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  using Buffer = std::unique_ptr<float, Free>;

  static Buffer allocate(int64_t num_floats) {
    return Buffer(static_cast<float*>(::operator new(static_cast<size_t>(num_floats) * 4, std::align_val_t{64})));
  }

  Buffer own_;
  float* start_;
};

/// Cuts one buffer into arrays on cache lines; over a null buffer it only counts.
class Carver {
 public:
  explicit Carver(float* start) : start_(start) {}

  template <typename T>
  T* take(int64_t count) {
    float* array = start_ ? start_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return reinterpret_cast<T*>(array);
  }

  int64_t num_floats() const { return used_; }

 private:
  float* start_;
  int64_t used_ = 0;
};

}  // namespace pagedkv
