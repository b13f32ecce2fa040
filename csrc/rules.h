// The scalar rules of the step, in float64: clip coefficient, bias corrections, trust ratio.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace lhopt {

// Columns of the float64 tables that the step shares with Python, in the order of types.py.
enum ScalarColumn {
  kLr,
  kOmbeta1,
  kOmbeta2,
  kEpsilon,
  kWeightDecay,
  kGroupClipGradNorm,
  kGradClipOmbeta,
  kLambUpdateNormOmbeta,
  kGroupClipGradZScore,
  kLambPower,
  kLambMinTrust,
  kLambMaxTrust,
  kNumScalars
};

enum GroupStateColumn {
  kRollingMax,
  kLogNormEma,
  kLogNormEmvar,
  kLogNormBiasCorrection,
  kNumGroupState
};

enum TensorStateColumn {
  kStep,
  kBiasCorrection1,
  kBiasCorrection2,
  kUpdateNormEma,
  kUpdateNormBiasCorrection,
  kParamNorm,
  kNumTensorState
};

enum StatisticColumn {
  kTaken,
  kGradNonfinite,
  kClipCoefficient,
  kStepSize,
  kDecayFactor,
  kGradSq,
  kParamSq,
  kUpdateSq,
  kMHatSq,
  kMHatMinusGradSq,
  kGradDotParam,
  kGradDotMHat,
  kGradDotUpdate,
  kCountGtEpsilon,
  kSumLogAbsUpdate,
  kGradDotMomentum,
  kMomentumSq,
  kCountSameSignMomentum,
  kCountSameSignGrad,
  kNumStatistics
};

// What a piece of a tensor adds to its statistics: their columns, and one more.
enum PartialSumColumn { kNewParamSq = kNumStatistics, kNumPartialSums };

enum GradientSumColumn { kPresent, kNonfinite, kSumSq, kNumGradientSums };

// Options of a group; values as in types.py.
enum class WeightDecay : uint8_t { kDecoupled, kInUpdate };
enum class Clip : uint8_t { kNone, kNorm, kRollingMax, kZScore };
enum class Trust : uint8_t { kNone, kExact, kDelayed };

struct GroupOptions {
  Denominator denominator;
  WeightDecay weight_decay;
  Clip clip;
  Trust trust;
  bool trust_ignores_vectors;
  bool radam_warmup;
  bool maximize;
};

// The factor c <= 1 for a group's gradients of this norm; advances the group's state row.
double ClipCoefficient(double norm, const GroupOptions& options, const double* scalars,
                       double* group_state);

// Counts the step and advances the bias corrections of a tensor's state row.
void AdvanceBiasCorrections(const double* scalars, double* tensor_state);

// Everything but the trust ratio's share, for a state row whose bias corrections are current.
Coefficients CoefficientsOf(double clip, const GroupOptions& options, const double* scalars,
                            const double* tensor_state);

// lr with the warm-up where there is one; the trust ratio is yet to be multiplied.
double LearningRate(const GroupOptions& options, const double* scalars, const double* tensor_state);

// T for these norms of parameter and update.
double TrustRatio(double param_norm, double update_norm, const double* scalars);

// The running norm of the updates so far, without bias; NaN before the first.
double UpdateNorm(const double* tensor_state);

// Takes this step's norm of the update into the running one.
void AdvanceUpdateNorm(double norm, const double* scalars, double* tensor_state);

}  // namespace lhopt
