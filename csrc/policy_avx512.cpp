// The policy kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#include "policy_kernels.h"

#define LHOPT_VEC_AVX512
#include "begin_target.h"
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kAvx512PolicyKernels, "avx512");
}

#include "end_target.h"

#endif
