// The kernels for NEON, which every 64-bit Arm processor has.
#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>

#include "kernels.h"

#define LHOPT_VEC_NEON
#include "step_kernels.h"

namespace lhopt {
LHOPT_DEFINE_KERNELS(kNeonKernels, "neon");
}

#endif
