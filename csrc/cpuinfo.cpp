#include <tvm/ffi/tvm_ffi.h>

#include <string>

namespace pagedkv {

/// Whether this CPU and operating system run the library built for `isa`.
bool cpu_supports(tvm::ffi::String isa) {
  const std::string name(isa.data(), isa.size());
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool avx2 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "baseline") return v2;
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
  if (name == "neon") return true;
#endif
  return false;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_supports, cpu_supports);

}  // namespace pagedkv
