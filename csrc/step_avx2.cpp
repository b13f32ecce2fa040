// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

#include "kernels.h"

#define LHOPT_VEC_AVX2
#include "begin_target.h"
#include "step_kernels.h"

namespace lhopt {
LHOPT_DEFINE_KERNELS(kAvx2Kernels, "avx2");
}

#include "end_target.h"

#endif
