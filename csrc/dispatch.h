// Which instruction set the step runs with.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace lhopt {

// Names of the instruction sets that this processor runs, the fastest first.
std::vector<std::string> AvailableIsas();

// The kernels named by the environment variable LHOPT_CPU_ISA, or the fastest ones where it is
// unset or empty. Throws std::invalid_argument if it names anything else.
const Kernels& ActiveKernels();

}  // namespace lhopt
