// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#include "kernels.h"

#define LHOPT_VEC_AVX512
#include "begin_target.h"
#include "step_kernels.h"

namespace lhopt {
LHOPT_DEFINE_KERNELS(kAvx512Kernels, "avx512");
}

#include "end_target.h"

#endif
