#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace lhopt {
namespace {

// Fastest first.
std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> available;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) available.push_back(&kAvx512Kernels);
  if (has_avx2) available.push_back(&kAvx2Kernels);
#elif defined(__aarch64__)
  available.push_back(&kNeonKernels);
#endif
  available.push_back(&kScalarKernels);
  return available;
}

}  // namespace

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : AvailableKernels()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& ActiveKernels() {
  const std::vector<const Kernels*> available = AvailableKernels();
  const char* const wanted = std::getenv("LHOPT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available.front();
  std::string names;
  for (const Kernels* kernels : available) {
    if (std::string(wanted) == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("LHOPT_CPU_ISA is \"" + std::string(wanted) +
                              "\", but this processor offers: " + names +
                              ". Unset it to take the fastest.");
}

}  // namespace lhopt
