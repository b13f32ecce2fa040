// The policy kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include "policy_kernels.h"

// Only what follows may use these instructions: library code that this unit shares with others
// through the linker must stay runnable everywhere, so no header but ours is included below.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define LHOPT_VEC_AVX2
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kAvx2PolicyKernels, "avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
