// The policy kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include "policy_kernels.h"

#define LHOPT_VEC_AVX2
#include "begin_target.h"
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kAvx2PolicyKernels, "avx2");
}

#include "end_target.h"

#endif
