#include "policy_runner.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "dispatch.h"

namespace lhopt {
namespace {

constexpr double kStateVersion = 1.0;
constexpr double kHalfWord = 4294967296.0;  // 2^32: float64 holds a 64-bit seed in two parts
constexpr double kMostDecisions = 9007199254740992.0;  // 2^53

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void Softmax(const float* logits, int64_t size, double* out) {
  const double largest = *std::max_element(logits, logits + size);
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    out[i] = std::exp(logits[i] - largest);
    total += out[i];
  }
  for (int64_t i = 0; i < size; ++i) out[i] /= total;
}

double Moved(double value, double shift, const ActionBounds& bounds) {
  if (shift == 0.0 || value == 0.0 || !std::isfinite(value)) return value;
  const double moved = bounds.is_logit
                           ? 1.0 / (1.0 + std::exp(-(BoundedLogit(value, bounds) + shift)))
                           : value * std::exp(shift);
  return std::clamp(moved, bounds.low, bounds.high);
}

// Reads a state from front to back; every value is checked as it is taken.
class StateReader {
 public:
  explicit StateReader(const std::vector<double>& state) : state_(state) {}

  double Take(const char* name, double low, double high) {
    const double value = state_[next_++];
    if (value >= low && value <= high) return value;
    throw std::invalid_argument("policy state: " + std::string(name) + " is " +
                                std::to_string(value) + ", expected a number from " +
                                std::to_string(low) + " to " + std::to_string(high));
  }
  double TakeWhole(const char* name, double low, double high) {
    const double value = Take(name, low, high);
    if (value == std::floor(value)) return value;
    throw std::invalid_argument("policy state: " + std::string(name) + " is " +
                                std::to_string(value) + ", expected a whole number");
  }
  // A norm may be anything that was observed.
  double TakeAny() { return state_[next_++]; }

 private:
  const std::vector<double>& state_;
  size_t next_ = 0;
};

constexpr double kLargestMoment = 1e300;
constexpr double kLargestShift = 1e300;

size_t StateSize(int64_t hidden) {
  constexpr size_t kScalars = 8, kPerSeries = 1 + 2 * kNumEndWeights;
  return kScalars + kNumHyperparameters + kNumSeries * kPerSeries + 2 * static_cast<size_t>(hidden);
}

}  // namespace

std::vector<int64_t> ActionSpace::HeadSizes() const {
  std::vector<int64_t> sizes;
  for (const auto& choices : shifts) sizes.push_back(static_cast<int64_t>(choices.size()));
  if (has_registers) sizes.push_back(kNumRegisterChoices);
  return sizes;
}

const PolicyKernels& ActivePolicyKernels() {
  const std::string name = ActiveKernels().name;
#if defined(__x86_64__)
  for (const PolicyKernels* kernels : {&kAvx512PolicyKernels, &kAvx2PolicyKernels}) {
    if (name == kernels->name) return *kernels;
  }
#elif defined(__aarch64__)
  if (name == kNeonPolicyKernels.name) return kNeonPolicyKernels;
#endif
  return kScalarPolicyKernels;
}

double CounterUniform(uint64_t seed, uint64_t step, uint64_t head) {
  constexpr uint64_t kAdd = 0x9E3779B97F4A7C15u;
  const uint64_t bits = Mix(Mix(Mix(seed + kAdd) + step + kAdd) + head + kAdd);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

PolicyRunner::PolicyRunner(const Weights& weights, ActionSpace actions, DecisionMode mode,
                           uint64_t seed)
    : actions_(std::move(actions)),
      head_sizes_(actions_.HeadSizes()),
      network_(weights, kNumPolicyFeatures, head_sizes_, ActivePolicyKernels()),
      mode_(mode),
      seed_(seed),
      probabilities_(std::accumulate(head_sizes_.begin(), head_sizes_.end(), int64_t{0})) {}

int PolicyRunner::Choose(size_t head, double* probabilities) const {
  const int64_t size = head_sizes_[head];
  Softmax(network_.logits(head), size, probabilities);
  if (mode_ != DecisionMode::kSample) {
    return static_cast<int>(std::max_element(probabilities, probabilities + size) - probabilities);
  }
  const double u = CounterUniform(seed_, decisions_, head);
  double cumulative = 0.0;
  for (int choice = 0; choice < size - 1; ++choice) {
    cumulative += probabilities[choice];
    if (u < cumulative) return choice;
  }
  return static_cast<int>(size - 1);
}

void PolicyRunner::Decide(const Observation& observation) {
  ComputePolicyFeatures(observation, actions_.bounds, memory_, network_.features());
  network_.Run();
  double* probabilities = probabilities_.data();
  for (size_t i = 0; i < kNumHyperparameters; ++i) {
    const std::vector<double>& shifts = actions_.shifts[i];
    const int choice = Choose(i, probabilities);
    const double shift = mode_ == DecisionMode::kMean
                             ? std::inner_product(shifts.begin(), shifts.end(), probabilities, 0.0)
                             : shifts[choice];
    memory_.shifts[i] = shift;
    hyperparameters_[i] = Moved(observation.hyperparameters[i], shift, actions_.bounds[i]);
    probabilities += shifts.size();
  }
  memory_.register_choice = actions_.has_registers ? Choose(kNumHyperparameters, probabilities) : 0;
  ++decisions_;
}

std::vector<double> PolicyRunner::GetState() const {
  std::vector<double> state = {kStateVersion,
                               static_cast<double>(kNumPolicyFeatures),
                               static_cast<double>(network_.hidden()),
                               static_cast<double>(seed_ >> 32),
                               static_cast<double>(seed_ & 0xFFFFFFFFu),
                               static_cast<double>(decisions_),
                               static_cast<double>(memory_.register_choice),
                               memory_.param_norm};
  state.reserve(StateSize(network_.hidden()));
  state.insert(state.end(), memory_.shifts.begin(), memory_.shifts.end());
  for (const CdfSeries& series : memory_.series) {
    state.push_back(series.count);
    state.insert(state.end(), series.mean.begin(), series.mean.end());
    state.insert(state.end(), series.var.begin(), series.var.end());
  }
  state.insert(state.end(), network_.h(), network_.h() + network_.hidden());
  state.insert(state.end(), network_.c(), network_.c() + network_.hidden());
  return state;
}

void PolicyRunner::SetState(const std::vector<double>& state) {
  const int64_t hidden = network_.hidden();
  const size_t size = StateSize(hidden);
  if (state.size() != size) {
    throw std::invalid_argument("policy state: " + std::to_string(state.size()) +
                                " numbers, expected " + std::to_string(size) +
                                "; it was saved with another policy or version");
  }
  StateReader reader(state);
  reader.Take("version", kStateVersion, kStateVersion);
  reader.Take("number of features", kNumPolicyFeatures, kNumPolicyFeatures);
  reader.Take("width", static_cast<double>(hidden), static_cast<double>(hidden));
  const double seed_high = reader.TakeWhole("seed (high half)", 0.0, kHalfWord - 1.0);
  const double seed_low = reader.TakeWhole("seed (low half)", 0.0, kHalfWord - 1.0);
  const double decisions = reader.TakeWhole("number of decisions", 0.0, kMostDecisions);
  FeatureMemory memory;
  memory.register_choice = static_cast<int>(
      reader.TakeWhole("register choice", kNoRegisterChoice, kNumRegisterChoices - 1));
  memory.param_norm = reader.TakeAny();
  for (double& shift : memory.shifts) shift = reader.Take("shift", -kLargestShift, kLargestShift);
  for (CdfSeries& series : memory.series) {
    series.count = reader.TakeWhole("count", 0.0, kMostDecisions);
    for (double& mean : series.mean) mean = reader.Take("mean", -kLargestMoment, kLargestMoment);
    for (double& var : series.var) var = reader.Take("variance", 0.0, kLargestMoment);
  }
  constexpr double kLargestFloat = 3e38;
  std::vector<float> h(hidden), c(hidden);
  for (float& value : h) value = static_cast<float>(reader.Take("h", -1.0, 1.0));
  for (float& value : c)
    value = static_cast<float>(reader.Take("c", -kLargestFloat, kLargestFloat));

  seed_ = static_cast<uint64_t>(seed_high) << 32 | static_cast<uint64_t>(seed_low);
  decisions_ = static_cast<uint64_t>(decisions);
  memory_ = memory;
  std::copy(h.begin(), h.end(), network_.h());
  std::copy(c.begin(), c.end(), network_.c());
}

}  // namespace lhopt
