#include "policy_features.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lhopt {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::array<double, kNumEndWeights> kEndWeights = {1.25, 2.5, 5.0, 10.0, 20.0};
constexpr double kLargestInSeries = 1e100;
constexpr double kLargestFeature = 1e6;
constexpr double kSqrtHalf = 0.70710678118654752440;

// The normal distribution function.
double Phi(double x) { return 0.5 * std::erfc(-x * kSqrtHalf); }

double Finite(double x) {
  return std::isfinite(x) ? std::clamp(x, -kLargestFeature, kLargestFeature) : 0.0;
}

double TanhOrZero(double x) { return std::isnan(x) ? 0.0 : std::tanh(x); }

// Writes features one after the other, in the order of the table in Python.
class Writer {
 public:
  explicit Writer(float* out) : out_(out) {}

  void Put(double value) { *out_++ = static_cast<float>(value); }
  void PutFlag(bool flag) { Put(flag ? 1.0 : 0.0); }
  void PutCdfs(CdfSeries& series, double x) {
    for (const double value : series.Update(x)) Put(value);
  }

 private:
  float* out_;
};

void PutPrevious(const FeatureMemory& memory, Writer& writer) {
  for (const double shift : memory.shifts) writer.Put(shift);
  for (int choice = 0; choice < kNumRegisterChoices; ++choice) {
    writer.PutFlag(memory.register_choice == choice);
  }
}

void PutHyperparameters(const Observation& o, const ActionTable& actions, Writer& writer) {
  for (int i = 0; i < kNumHyperparameters; ++i) {
    const double now = o.hyperparameters[i], start = o.start_hyperparameters[i];
    writer.Put(Finite(actions[i].is_logit
                          ? BoundedLogit(now, actions[i]) - BoundedLogit(start, actions[i])
                          : std::log(now) - std::log(start)));
  }
}

}  // namespace

std::array<double, kNumEndWeights> CdfSeries::Update(double x) {
  std::array<double, kNumEndWeights> values;
  values.fill(0.5);
  if (!(std::fabs(x) <= kLargestInSeries)) return values;
  count += 1.0;
  for (int w = 0; w < kNumEndWeights; ++w) {
    const double rate = kEndWeights[w] / (count + kEndWeights[w] - 1.0);
    const double delta = x - mean[w];
    mean[w] += rate * delta;
    var[w] = (1.0 - rate) * (var[w] + rate * delta * delta);
    if (var[w] > 0.0) values[w] = Phi((x - mean[w]) / std::sqrt(var[w]));
  }
  return values;
}

FeatureMemory::FeatureMemory() : param_norm(kNaN) {}

double BoundedLogit(double value, const ActionBounds& bounds) {
  if (std::isnan(value)) return value;
  const double bounded = std::clamp(value, bounds.low, bounds.high);
  return std::log(bounded) - std::log(1.0 - bounded);
}

void ComputePolicyFeatures(const Observation& o, const ActionTable& actions, FeatureMemory& memory,
                           float* out) {
  const double log_norm = std::log(o.param_norm);
  const double log_train = std::log(o.train_loss);
  const double log_eval = o.has_eval_loss ? std::log(o.eval_loss) : kNaN;
  const double loss_ratio = log_train - log_eval;
  const double path_ratio = std::log(o.path_length) - log_norm;
  const double norm_ratio = log_norm - std::log(memory.param_norm);

  Writer writer(out);
  writer.Put(Finite(o.progress));
  writer.Put(Finite(1.0 / o.outer_steps));
  CdfSeries* series = memory.series.data();
  for (const double x : o.inner) {
    writer.Put(Finite(x));
    writer.PutCdfs(*series++, x);
  }
  writer.Put(TanhOrZero(loss_ratio));
  writer.PutCdfs(*series++, loss_ratio);
  writer.PutFlag(o.has_eval_loss && std::isnan(loss_ratio));
  for (const double x : {path_ratio, norm_ratio}) {
    writer.Put(TanhOrZero(x));
    writer.PutCdfs(*series++, x);
  }
  writer.PutCdfs(*series++, log_train);
  writer.PutFlag(std::isnan(log_train));
  writer.PutFlag(std::isinf(log_train));
  writer.PutCdfs(*series++, log_eval);
  writer.PutFlag(o.has_eval_loss && std::isnan(log_eval));
  writer.PutFlag(std::isinf(log_eval));
  for (int i = 0; i < kNumRegisters; ++i) {
    writer.Put(TanhOrZero(std::log(o.register_losses[i]) - log_train));
    writer.Put(Finite(o.register_progress[i]));
  }
  PutHyperparameters(o, actions, writer);
  PutPrevious(memory, writer);
  writer.PutFlag(!o.has_eval_loss);
  memory.param_norm = o.param_norm;
}

}  // namespace lhopt
