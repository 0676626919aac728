#include "tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pagedkv {

/// Asks the system for large memory pages under a tensor that has not been written yet: walks through page tables in random
/// order then miss the translation caches less. Asking is all it does; a system that says no changes nothing.
void advise_huge_pages(TensorView tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(data<char>(tensor));
  const uintptr_t end = start + static_cast<uintptr_t>(tensor.numel() * item_bytes(tensor));
  const uintptr_t first = (start + kLarge - 1) / kLarge * kLarge, last = end / kLarge * kLarge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(advise_huge_pages, advise_huge_pages);

}  // namespace pagedkv
