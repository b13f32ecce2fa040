// The kernels in plain C++: the fallback everywhere, and the tails of the vector kernels.
#include <math.h>

#include <cmath>

#include "kernels.h"
#include "step_kernels.h"

namespace lhopt {
LHOPT_DEFINE_KERNELS(kScalarKernels, "scalar");
}
