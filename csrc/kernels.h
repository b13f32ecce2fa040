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

// How parameters are kept between steps; see kernels/formats.py. The first are DType's; the others,
// bfloat16 and what it lacks of a float32 master, in 8 or 16 bits.
enum class WeightsType : uint8_t { kFloat32, kBFloat16, kFloat16, kSplit8, kSplit16 };
inline constexpr int kNumWeightsTypes = 5;
inline constexpr int64_t kParamBytes[kNumWeightsTypes] = {4, 2, 2, 2, 2};
inline constexpr int64_t kCorrectionBytes[kNumWeightsTypes] = {0, 0, 0, 1, 2};

inline bool IsSplit(WeightsType weights) { return kCorrectionBytes[static_cast<int>(weights)] > 0; }

// How moments are.
enum class MomentType : uint8_t { kFloat32, kBFloat16, kCodes };
inline constexpr int kNumMomentTypes = 3;
inline constexpr int64_t kMomentBytes[kNumMomentTypes] = {4, 2, 1};

// Elements that share a scale, and each of which has a place in the dither.
inline constexpr int64_t kScaleBlock = 64;

// By place, what is added to moments before they are cut off for storage.
struct Dither {
  uint32_t words[kScaleBlock];  // of 16 bits
  float shares[kScaleBlock];    // the same, of the distance between two codes
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
  void* corrections;  // of split weights
  const void* grad;
  void* exp_avg;            // m
  void* exp_avg_sq;         // v
  uint16_t* exp_avg_scale;  // of codes, the bits of their bfloat16 scales
  uint16_t* exp_avg_sq_scale;
  const Dither* dither;  // of moments that are not float32
  int64_t place;         // of the first element in the dither; 0 with codes
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
// Without statistics at most the first three are filled. g.m follows from g.momentum and |g|^2.
struct alignas(64) Sums {
  double param_sq;
  double update_sq;
  double new_param_sq;  // of the parameters as stored
  double grad_sq;       // with scaled gradients, as far as float32 reaches; see SumGradient
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
    grad_sq += other.grad_sq;
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

// Sizes are multiples of the instruction set's width, and of a block where moments are codes, but
// where a comment says otherwise.

// Adds to `sums`. Returns how many elements it has stepped: with `looks`, those before the first
// block of kScaleBlock that holds a gradient that is not finite.
using UpdateKernel = int64_t (*)(const Slice& slice, const Coefficients& coefficients, Sums& sums,
                                 bool looks);
// Adds to `sums.new_param_sq`.
using ApplyKernel = void (*)(const Slice& slice, const Coefficients& coefficients, Sums& sums);
// Any size. Sum of (scale g)^2.
using SumOfSquaresKernel = double (*)(const void* grad, int64_t size, float scale);
// Any size. Packs scale g < 0 into bits (element i is bit i % 8 of byte i / 8) and returns how many
// bits stayed as they were.
using PackSignsKernel = int64_t (*)(const void* grad, int64_t size, float scale, uint8_t* bits);
// The slice's gradients to float32.
using ReadGradientsKernel = void (*)(const Slice& slice, float* gradients);
// Its weights to float32, and from there to how they are kept.
using ReadWeightsKernel = void (*)(const Slice& slice, float* weights);
using WriteWeightsKernel = void (*)(const float* weights, const Slice& slice);
// To one of the two nearest numbers at random, the first element being number `element` of those
// with these keys.
using WriteRandomlyKernel = void (*)(const float* weights, const RandomKeys& keys, uint32_t element,
                                     const Slice& slice);
// Both moments, in the same way.
using ReadMomentsKernel = void (*)(const Slice& slice, float* exp_avg, float* exp_avg_sq);
using WriteMomentsKernel = void (*)(const float* exp_avg, const float* exp_avg_sq,
                                    const Slice& slice);

// An update for each combination would be hundreds of kernels, most of which nobody runs. Weights
// and gradients have theirs in the pairs that training makes: float32 with its own gradients or
// with bfloat16 ones (of a parameter whose master it is), bfloat16, split or not, with bfloat16,
// and float16 with float16 and float32 moments. The others are null: those numbers become float32
// before the step and are written again after it.
struct Kernels {
  const char* name;
  int64_t width;  // elements per vector
  // Moments, with or without statistics:
  // [weights][grad dtype][moments][denominator][statistics][pass].
  UpdateKernel update[kNumWeightsTypes][kNumDTypes][kNumMomentTypes][kNumDenominators][2]
                     [kNumPasses];
  // The parameters' update from stored float32 moments: [weights][denominator].
  ApplyKernel apply[kNumWeightsTypes][kNumDenominators];
  SumOfSquaresKernel sum_of_squares[kNumDTypes];
  PackSignsKernel pack_signs[kNumDTypes];
  ReadGradientsKernel read_gradients[kNumDTypes];
  ReadWeightsKernel read_weights[kNumWeightsTypes];
  WriteWeightsKernel write_weights[kNumWeightsTypes];
  WriteRandomlyKernel write_randomly[kNumDTypes];
  ReadMomentsKernel read_moments[kNumMomentTypes];
  WriteMomentsKernel write_moments[kNumMomentTypes];
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace lhopt
