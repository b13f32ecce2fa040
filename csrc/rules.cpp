#include "rules.h"

#include <algorithm>
#include <cmath>

namespace lhopt {
namespace {

// exp(mu + z sigma) of the log norms so far, this one included.
double ZScoreClip(double norm, double beta, double z_score, double* state) {
  const double log_norm = std::log(norm + 1e-15);
  state[kLogNormEma] = beta * state[kLogNormEma] + (1 - beta) * log_norm;
  state[kLogNormBiasCorrection] = beta * state[kLogNormBiasCorrection] + (1 - beta);
  const double correction = state[kLogNormBiasCorrection];
  const double mean = state[kLogNormEma] / correction;
  const double distance = log_norm - mean;
  state[kLogNormEmvar] = beta * state[kLogNormEmvar] + (1 - beta) * distance * distance;
  return std::exp(mean + z_score * std::sqrt(state[kLogNormEmvar] / correction));
}

}  // namespace

double ClipCoefficient(double norm, const GroupOptions& options, const double* scalars,
                       double* group_state) {
  const double beta = 1.0 - scalars[kGradClipOmbeta];
  double clip = 0.0;
  switch (options.clip) {
    case Clip::kNone:
      return 1.0;
    case Clip::kNorm:
      clip = scalars[kGroupClipGradNorm];
      break;
    case Clip::kRollingMax:
      group_state[kRollingMax] = std::max(norm, beta * group_state[kRollingMax]);
      clip = scalars[kGroupClipGradNorm] * group_state[kRollingMax];
      break;
    case Clip::kZScore:
      clip = ZScoreClip(norm, beta, scalars[kGroupClipGradZScore], group_state);
      break;
  }
  return std::min(1.0, clip / (norm + 1e-6));
}

void AdvanceBiasCorrections(const double* scalars, double* tensor_state) {
  const double beta1 = 1.0 - scalars[kOmbeta1], beta2 = 1.0 - scalars[kOmbeta2];
  tensor_state[kStep] += 1.0;
  tensor_state[kBiasCorrection1] = beta1 * tensor_state[kBiasCorrection1] + (1 - beta1);
  tensor_state[kBiasCorrection2] = beta2 * tensor_state[kBiasCorrection2] + (1 - beta2);
}

Coefficients CoefficientsOf(double clip, const GroupOptions& options, const double* scalars,
                            const double* tensor_state) {
  const double beta1 = 1.0 - scalars[kOmbeta1], beta2 = 1.0 - scalars[kOmbeta2];
  const bool in_update = options.weight_decay == WeightDecay::kInUpdate;
  const double bc1 = tensor_state[kBiasCorrection1];
  const bool is_max = options.denominator == Denominator::kMax;
  const double root_bc2 = is_max ? 1.0 : std::sqrt(tensor_state[kBiasCorrection2]);  // s = r / this
  Coefficients c{};
  c.grad_scale = static_cast<float>(options.maximize ? -clip : clip);
  c.beta1 = static_cast<float>(beta1);
  c.ombeta1 = static_cast<float>(1 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.ombeta2 = static_cast<float>(1 - beta2);
  c.inv_bias_correction1 = static_cast<float>(1.0 / bc1);
  c.denominator_scale = static_cast<float>(bc1 / root_bc2);
  c.denominator_offset = static_cast<float>(bc1 * scalars[kEpsilon]);
  c.denominator_threshold = static_cast<float>(root_bc2 * scalars[kEpsilon]);
  c.weight_decay = in_update ? static_cast<float>(scalars[kWeightDecay]) : 0.0f;
  return c;
}

double LearningRate(const GroupOptions& options, const double* scalars,
                    const double* tensor_state) {
  if (!options.radam_warmup) return scalars[kLr];
  return scalars[kLr] * std::sqrt(2.0 / (2.0 - tensor_state[kBiasCorrection2]) - 1.0);
}

double TrustRatio(double param_norm, double update_norm, const double* scalars) {
  if (param_norm < 1e-8 || update_norm < 1e-8) return 1.0;
  const double ratio =
      std::min(std::max(param_norm / update_norm, scalars[kLambMinTrust]), scalars[kLambMaxTrust]);
  return std::pow(ratio, scalars[kLambPower]);
}

double UpdateNorm(const double* tensor_state) {
  return tensor_state[kUpdateNormEma] / tensor_state[kUpdateNormBiasCorrection];
}

void AdvanceUpdateNorm(double norm, const double* scalars, double* tensor_state) {
  const double ombeta = scalars[kLambUpdateNormOmbeta];
  double& ema = tensor_state[kUpdateNormEma];
  double& correction = tensor_state[kUpdateNormBiasCorrection];
  ema = (1 - ombeta) * ema + ombeta * norm;
  correction = (1 - ombeta) * correction + ombeta;
}

}  // namespace lhopt
