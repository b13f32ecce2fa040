// Policy features of one training run: the twin of lhopt_fused/policy/features.py, in float64.
#pragma once

#include <array>
#include <cstdint>

namespace lhopt {

inline constexpr int kNumHyperparameters = 8;
inline constexpr int kNumInnerFeatures = 13;
inline constexpr int kNumRegisters = 3;
inline constexpr int kNumRegisterChoices = 1 + 3 * kNumRegisters;
inline constexpr int kNumEndWeights = 5;
// The inner features; log ratios of losses, path and norm; log train and eval loss.
inline constexpr int kNumSeries = kNumInnerFeatures + 5;
inline constexpr int kNumPolicyFeatures = 2 + kNumInnerFeatures + kNumSeries * kNumEndWeights + 3 +
                                          5 + 2 * kNumRegisters + 2 * kNumHyperparameters +
                                          kNumRegisterChoices + 1;
inline constexpr int kNoRegisterChoice = -1;  // before the first decision

using Hyperparameters = std::array<double, kNumHyperparameters>;

// One hyperparameter's kind and bounds.
struct ActionBounds {
  bool is_logit;
  double low;
  double high;
};
using ActionTable = std::array<ActionBounds, kNumHyperparameters>;

// What one outer step shows of a training run; see lhopt_fused.policy.features.Observation.
struct Observation {
  std::array<double, kNumInnerFeatures> inner;
  double train_loss;
  double eval_loss;
  bool has_eval_loss;
  double progress;
  double outer_steps;
  double path_length;
  double param_norm;
  Hyperparameters hyperparameters;
  Hyperparameters start_hyperparameters;
  std::array<double, kNumRegisters> register_losses;
  std::array<double, kNumRegisters> register_progress;
};

// Running moments of one series; see lhopt_fused/cdf.py.
struct CdfSeries {
  double count = 0.0;
  std::array<double, kNumEndWeights> mean{};
  std::array<double, kNumEndWeights> var{};

  // Takes x in, unless it is not finite or beyond 1e100, and says where it stands.
  std::array<double, kNumEndWeights> Update(double x);
};

// What the features remember from one outer step to the next.
struct FeatureMemory {
  std::array<CdfSeries, kNumSeries> series;
  double param_norm;  // one outer step before, NaN at first
  Hyperparameters shifts{};
  int register_choice = kNoRegisterChoice;

  FeatureMemory();
};

// Value clamped to the bounds, as a logit.
double BoundedLogit(double value, const ActionBounds& bounds);

// Fills kNumPolicyFeatures finite values; the previous decision in `memory` stays.
void ComputePolicyFeatures(const Observation& observation, const ActionTable& actions,
                           FeatureMemory& memory, float* out);

}  // namespace lhopt
