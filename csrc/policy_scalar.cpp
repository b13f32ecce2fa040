// The policy kernels in plain C++: the fallback everywhere.
#include <math.h>

#include <cmath>

#include "policy_kernels.h"
#include "policy_simd.h"

namespace lhopt {
LHOPT_DEFINE_POLICY_KERNELS(kScalarPolicyKernels, "scalar");
}
