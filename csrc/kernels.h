// What the step driver asks of an instruction set: a table of kernels over contiguous slices.
#pragma once

#include <cstdint>

#include "rounding.h"

namespace lhopt {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };
inline constexpr int kNumDTypes = 3;
inline constexpr int64_t kDTypeSize[kNumDTypes] = {4, 2, 2};
inline constexpr int8_t kNoGradient = -1;  // in place of a gradient's dtype

enum class Denominator : uint8_t { kRms, kMax };
inline constexpr int kNumDenominators = 2;

// How moments are kept between steps; see kernels/formats.py.
enum class MomentType : uint8_t { kFloat32, kBFloat16, kCodes };
inline constexpr int kNumMomentTypes = 3;

// What a bfloat16 parameter keeps of its master; see kernels/formats.py.
enum class Correction : uint8_t { kNone, k8Bits, k16Bits };
inline constexpr int kNumCorrections = 3;

// Elements that share a scale, and each of which has a place in the dither.
inline constexpr int64_t kScaleBlock = 64;

// By place, what is added to moments before they are cut off for storage.
struct Dither {
  uint32_t words[kScaleBlock];  // of 16 bits
  float shares[kScaleBlock];    // the same, of the distance between two codes
};

// The same piece of both moments as codes of 8 bits, with the bits of their bfloat16 scales.
struct Codes {
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  uint16_t* exp_avg_scale;
  uint16_t* exp_avg_sq_scale;
};

// What a pass over the moments does besides: what a tensor's trust ratio asks for.
enum class Pass : uint8_t {
  kPlain,       // updates the parameters; nobody needs norms (statistics have their own)
  kWithNorms,   // updates the parameters, and sums all norms for the next step's trust ratio
  kMomentsOnly  // sums the norms that this step's trust ratio waits for
};
inline constexpr int kNumPasses = 3;

// The same piece of one tensor's arrays, in memory order.
struct Slice {
  void* param;
  const void* grad;
  float* exp_avg;     // m
  float* exp_avg_sq;  // v
  int64_t size;
};

// Every number that the arithmetic of one tensor's step needs. With r = sqrt(v), or v itself for
// the maximum, the update is m_hat / (s + epsilon) = m / (denominator_scale r +
// denominator_offset), and s > epsilon means r > denominator_threshold. `weight_decay` acts within
// the update and `decay_factor` on the parameter; at most one of them differs from its neutral
// value.
struct Coefficients {
  float grad_scale;  // clip coefficient, negative to maximize
  float beta1;
  float ombeta1;
  float beta2;
  float ombeta2;
  float inv_bias_correction1;
  float denominator_scale;
  float denominator_offset;
  float denominator_threshold;
  float weight_decay;
  float decay_factor;
  float step_size;
};

// Sums over a slice; `m_hat_*` are over m itself until the driver divides by the bias correction.
// Without statistics at most the first three are filled. |g|^2 is known from
// the gradient pass, and g.m follows from it and g.momentum.
struct alignas(64) Sums {
  double param_sq;
  double update_sq;
  double new_param_sq;  // of the parameters as stored
  double m_sq;
  double m_hat_minus_grad_sq;
  double grad_dot_param;
  double grad_dot_update;
  double grad_dot_momentum;  // momentum: m before the step
  double momentum_sq;
  double sum_log_abs_update;
  double count_gt_epsilon;
  double count_same_sign_momentum;
  double count_same_sign_grad;

  void operator+=(const Sums& other) {
    param_sq += other.param_sq;
    update_sq += other.update_sq;
    new_param_sq += other.new_param_sq;
    m_sq += other.m_sq;
    m_hat_minus_grad_sq += other.m_hat_minus_grad_sq;
    grad_dot_param += other.grad_dot_param;
    grad_dot_update += other.grad_dot_update;
    grad_dot_momentum += other.grad_dot_momentum;
    momentum_sq += other.momentum_sq;
    sum_log_abs_update += other.sum_log_abs_update;
    count_gt_epsilon += other.count_gt_epsilon;
    count_same_sign_momentum += other.count_same_sign_momentum;
    count_same_sign_grad += other.count_same_sign_grad;
  }
};

// Adds to `sums`; `slice.size` is a multiple of the instruction set's width.
using UpdateKernel = void (*)(const Slice& slice, const Coefficients& coefficients, Sums& sums);
// Any size. Sum of (scale g)^2.
using SumOfSquaresKernel = double (*)(const void* grad, int64_t size, float scale);
// Any size. Packs scale g < 0 into bits (element i is bit i % 8 of byte i / 8) and returns how many
// bits stayed as they were.
using PackSignsKernel = int64_t (*)(const void* grad, int64_t size, float scale, uint8_t* bits);
// Any size. To float32, and from there to the nearest number.
using WidenKernel = void (*)(const void* from, int64_t size, float* to);
using NarrowKernel = void (*)(const float* from, int64_t size, void* to);
// Any size. To one of the two nearest numbers at random, the first element being number `element`
// of those with these keys. Returns the sum of squares of what is stored.
using NarrowRandomlyKernel = double (*)(const float* from, int64_t size, const RandomKeys& keys,
                                        uint32_t element, void* to);
// Whole blocks of codes, to float32 and back.
using DecodeKernel = void (*)(const Codes& from, int64_t size, float* exp_avg, float* exp_avg_sq);
using EncodeKernel = void (*)(const float* exp_avg, const float* exp_avg_sq, int64_t size,
                              const Dither& dither, const Codes& to);
// Any size. To bfloat16, dithered, the first element being the first of a block.
using NarrowDitheredKernel = void (*)(const float* from, int64_t size, const Dither& dither,
                                      void* to);
// Any size. A bfloat16 parameter and its correction to the float32 master, and back.
using JoinKernel = void (*)(const void* param, const void* correction, int64_t size, float* master);
using SplitKernel = void (*)(const float* master, int64_t size, void* param, void* correction);

struct Kernels {
  const char* name;
  int64_t width;  // elements per vector
  // Moments, with or without statistics: [param dtype][grad dtype][denominator][statistics][pass].
  UpdateKernel update[kNumDTypes][kNumDTypes][kNumDenominators][2][kNumPasses];
  // The parameters' update from stored moments: [param dtype][denominator].
  UpdateKernel apply[kNumDTypes][kNumDenominators];
  SumOfSquaresKernel sum_of_squares[kNumDTypes];
  PackSignsKernel pack_signs[kNumDTypes];
  WidenKernel widen[kNumDTypes];
  NarrowKernel narrow[kNumDTypes];
  NarrowRandomlyKernel narrow_randomly[kNumDTypes];
  DecodeKernel decode;
  EncodeKernel encode;
  NarrowDitheredKernel narrow_dithered;
  JoinKernel join[kNumCorrections];
  SplitKernel split[kNumCorrections];
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace lhopt
