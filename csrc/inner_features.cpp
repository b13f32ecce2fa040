#include "inner_features.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "rules.h"

namespace lhopt {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kTiny = 1e-8;

double Log(double x) { return std::log(x + kTiny); }

// NaN stays NaN here and below: std::max and std::clamp return their first argument then.
double Cosine(double dot, double x_norm, double y_norm) {
  return dot / std::max(x_norm * y_norm, kTiny);
}

double Phi(double x) { return 0.5 * std::erfc(-x * 0.707106781186547524); }

double Logit(double p) {
  p = std::clamp(p, kTiny, 1.0 - kTiny);
  return std::log(p / (1.0 - p));
}

// Infinities count as the largest numbers.
double Finite(double x) {
  constexpr double kLargest = std::numeric_limits<double>::max();
  return std::clamp(x, -kLargest, kLargest);
}

void AddMeasured(double x, double& total, double& count) {
  if (std::isnan(x)) return;
  total += Finite(x);
  count += 1.0;
}

}  // namespace

InnerFeatures::InnerFeatures(std::vector<int64_t> numel, std::vector<int32_t> group_of,
                             std::vector<uint8_t> group_clips, std::vector<int32_t> run_of,
                             int32_t num_runs)
    : numel_(std::move(numel)),
      group_of_(std::move(group_of)),
      group_clips_(std::move(group_clips)),
      run_of_(std::move(run_of)),
      groups_(group_clips_.size()),
      runs_(num_runs) {}

void InnerFeatures::Means::Add(const double* features) {
  for (int f = 0; f < kNumFeatures; ++f) AddMeasured(features[f], total[f], count[f]);
}

void InnerFeatures::Means::AddMeansOf(const Means& other) {
  for (int f = 0; f < kNumFeatures; ++f) {
    AddMeasured(other.total[f] / other.count[f], total[f], count[f]);
  }
}

void InnerFeatures::Accumulate(const double* statistics, double* sums) {
  std::fill(groups_.begin(), groups_.end(), Means{});
  std::fill(runs_.begin(), runs_.end(), Run{});
  for (size_t t = 0; t < numel_.size(); ++t) {
    const double* const row = statistics + t * kNumStatistics;
    if (!(row[kTaken] > 0.0)) continue;
    const int32_t group = group_of_[t];
    Run& run = runs_[run_of_[group]];
    run.takes_part = true;
    run.update_sq += row[kStepSize] * row[kStepSize] * row[kUpdateSq];
    run.param_sq += row[kParamSq];
    if (numel_[t] == 0) continue;
    double features[kNumFeatures];
    TensorFeatures(row, numel_[t], group_clips_[group], features);
    groups_[group].Add(features);
  }
  for (size_t group = 0; group < groups_.size(); ++group) {
    runs_[run_of_[group]].means.AddMeansOf(groups_[group]);
  }
  for (size_t run = 0; run < runs_.size(); ++run) {
    AddStep(runs_[run], sums + run * kNumAccumulated,
            sums + (runs_.size() + run) * kNumAccumulated);
  }
}

void InnerFeatures::AddStep(const Run& run, double* sums, double* counts) {
  for (int f = 0; f < kNumFeatures; ++f) {
    AddMeasured(run.means.total[f] / run.means.count[f], sums[f], counts[f]);
  }
  if (!run.takes_part) return;
  AddMeasured(std::sqrt(run.update_sq), sums[kUpdateNorm], counts[kUpdateNorm]);
  AddMeasured(std::sqrt(run.param_sq), sums[kAllParamNorm], counts[kAllParamNorm]);
}

void InnerFeatures::TensorFeatures(const double* row, int64_t numel, bool clips,
                                   double* features) const {
  const double n = static_cast<double>(numel), root = std::sqrt(n);
  const double grad = std::sqrt(row[kGradSq]), param = std::sqrt(row[kParamSq]);
  const double update = std::sqrt(row[kUpdateSq]), m_hat = std::sqrt(row[kMHatSq]);
  const double momentum = std::sqrt(row[kMomentumSq]);
  const double noise = std::sqrt(row[kMHatMinusGradSq]);
  const double log_grad = Log(grad), log_param = Log(param), log_m_hat = Log(m_hat);
  const double grad_dot_new_param =
      row[kDecayFactor] * row[kGradDotParam] - row[kStepSize] * row[kGradDotUpdate];
  const double cosine_momentum = Cosine(row[kGradDotMHat], grad, m_hat);
  const double cosine_param = Cosine(grad_dot_new_param, grad, param);
  const double cosine_update = Cosine(row[kGradDotUpdate], grad, update);
  const bool has_momentum = row[kMomentumSq] > 0.0;

  features[kDidGradClip] = clips ? row[kClipCoefficient] < 1.0 : kNaN;
  features[kSqrtVHatGtEpsilon] = row[kCountGtEpsilon] / n;
  features[kMeanLogAbsUpdate] = row[kSumLogAbsUpdate] / n;
  features[kLogTwoRegimesScale] = log_m_hat - log_grad;
  features[kLogUpdateNormOverParamNorm] = Log(row[kStepSize] * update) - log_param;
  features[kLogNoiseScale] = log_m_hat - Log(noise);
  features[kCosineGradMomentum] = cosine_momentum;
  features[kCosineGradParam] = cosine_param;
  features[kLogLamb] = log_param - Log(update);
  features[kCosineGradUpdate] = cosine_update;
  features[kLogitCdfCosineGradMomentum] = Logit(Phi(cosine_momentum * root));
  features[kLogitCdfCosineGradUpdate] = Logit(Phi(cosine_update * root));
  features[kCdfCosineGradParam] = Phi(cosine_param * root);
  features[kCosineGradPreviousMomentum] =
      has_momentum ? Cosine(row[kGradDotMomentum], grad, momentum) : kNaN;
  features[kSignAgreementPreviousMomentum] = has_momentum ? row[kCountSameSignMomentum] / n : kNaN;
  features[kSignAgreementConsecutiveGrads] = row[kCountSameSignGrad] / n;
}

}  // namespace lhopt
