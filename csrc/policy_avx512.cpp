// The policy kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#include "policy_kernels.h"

// Only what follows may use these instructions: library code that this unit shares with others
// through the linker must stay runnable everywhere, so no header but ours is included below.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
// False alarms within the intrinsics of GCC 12.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define LHOPT_VEC_AVX512
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kAvx512PolicyKernels, "avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
