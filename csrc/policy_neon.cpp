// The policy kernels for NEON, which every 64-bit Arm processor has.
#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>

#include "policy_kernels.h"

#define LHOPT_VEC_NEON
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kNeonPolicyKernels, "neon");
}

#endif
