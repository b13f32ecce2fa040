// What the policy network asks of an instruction set: a table of kernels over padded vectors.
#pragma once

#include <cstdint>

namespace lhopt {

// Every vector of the network is padded to a multiple of this many floats (one AVX-512 register),
// so that no kernel has a tail.
inline constexpr int64_t kPanel = 16;

struct PolicyKernels {
  const char* name;
  // out = bias + W x, 16 num_panels values. Panel p holds rows 16 p to 16 p + 15 of W, column after
  // column. `out` may be `bias`.
  void (*affine)(const float* panels, const float* bias, const float* x, int64_t columns,
                 int64_t num_panels, float* out);
  // x = max(x, 0).
  void (*relu)(float* x, int64_t size);
  // out = clamp((x - mean) scale, -clip, clip).
  void (*normalize)(const float* x, const float* mean, const float* scale, float clip, int64_t size,
                    float* out);
  // out += scale (x - mean(x)) / sqrt(var(x) + 1e-5).
  void (*add_layer_norm)(const float* x, const float* scale, int64_t size, float* out);
  // cell = sigmoid(f) cell + sigmoid(i) tanh(g) for `gates` = (i, f, g, o), each of `size`.
  void (*update_cell)(const float* gates, int64_t size, float* cell);
  // out = sigmoid(gate) tanh(x).
  void (*gated_tanh)(const float* gate, const float* x, int64_t size, float* out);
};

extern const PolicyKernels kScalarPolicyKernels;
#if defined(__x86_64__)
extern const PolicyKernels kAvx2PolicyKernels;
extern const PolicyKernels kAvx512PolicyKernels;
#elif defined(__aarch64__)
extern const PolicyKernels kNeonPolicyKernels;
#endif

}  // namespace lhopt
