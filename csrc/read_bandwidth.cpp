#include "tensor.h"

#include <algorithm>
#include <atomic>

namespace pagedkv {
namespace {

/// Sums 64-byte lines in eight independent chains, so that only memory can be what it waits for.
uint64_t read_lines(const uint64_t* words, int64_t num_words) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= num_words; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

/// Reads a contiguous tensor once with `num_threads`, for measuring the ceiling of kernels that stream; returns a checksum.
int64_t read_bandwidth(TensorView tensor, int64_t num_threads) {
  const uint64_t* words = data<const uint64_t>(tensor);
  const int64_t num_words = tensor.numel() * item_bytes(tensor) / 8;
  [[maybe_unused]] const int workers = static_cast<int>(std::max<int64_t>(1, num_threads));
  // Parts are taken one after another, so that a thread that is held up does not set the time alone.
  constexpr int64_t kPart = int64_t{1} << 17;
  const int64_t num_parts = (num_words + kPart - 1) / kPart;
  std::atomic<uint64_t> total{0};
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
  for (int64_t part = 0; part < num_parts; ++part)
    total += read_lines(words + part * kPart, std::min(kPart, num_words - part * kPart));
  return static_cast<int64_t>(total.load());
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_bandwidth, read_bandwidth);

}  // namespace pagedkv
