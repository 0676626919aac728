#pragma once

#include <cstdint>
#include <memory>
#include <new>

/// Memory that outlives a call, so that a call per layer does not pay for fresh pages each time.
namespace pagedkv {

/// At least `num_floats` floats on a cache line, kept by the calling thread until it asks for more.
inline float* thread_scratch(int64_t num_floats) {
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t capacity = 0;
  if (num_floats > capacity) {
    capacity = 0;
    buffer.reset();
    buffer.reset(static_cast<float*>(::operator new(static_cast<size_t>(num_floats) * 4, std::align_val_t{64})));
    capacity = num_floats;
  }
  return buffer.get();
}

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
