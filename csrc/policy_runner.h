// A policy at work on one training run: one call per outer step takes what was observed and gives
// new hyperparameters. The twin of lhopt_fused.policy.decision.policy_step.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "policy_features.h"
#include "policy_network.h"

namespace lhopt {

enum class DecisionMode { kMean, kSample, kArgmax };

// What a policy may do: for each hyperparameter its bounds and the shifts to choose from (log
// multipliers, or shifts of the logit); and whether there is a head for the registers.
struct ActionSpace {
  ActionTable bounds;
  std::array<std::vector<double>, kNumHyperparameters> shifts;
  bool has_registers;

  // Choices per head; the register head comes last.
  std::vector<int64_t> HeadSizes() const;
};

// The kernels of the instruction set that LHOPT_CPU_ISA names, or of the fastest one.
const PolicyKernels& ActivePolicyKernels();

// A uniform number in [0, 1): see lhopt_fused.policy.decision.uniform.
double CounterUniform(uint64_t seed, uint64_t step, uint64_t head);

class PolicyRunner {
 public:
  // Throws std::invalid_argument where weights and actions do not fit together.
  PolicyRunner(const Weights& weights, ActionSpace actions, DecisionMode mode, uint64_t seed);

  // One outer step; allocates nothing. The results below are valid until the next one.
  void Decide(const Observation& observation);

  const Hyperparameters& hyperparameters() const { return hyperparameters_; }
  const Hyperparameters& shifts() const { return memory_.shifts; }
  int register_choice() const { return memory_.register_choice; }
  const float* features() const { return network_.features(); }  // [kNumPolicyFeatures]
  const std::vector<double>& probabilities() const { return probabilities_; }  // of all heads
  const char* isa() const { return network_.isa(); }

  // Everything that changes from one outer step to the next, and the seed, in one flat array that
  // only a runner with a network of the same width takes back. SetState throws
  // std::invalid_argument, and changes nothing, where the array is not such a state.
  std::vector<double> GetState() const;
  void SetState(const std::vector<double>& state);

 private:
  // Fills the head's probabilities and returns the chosen index.
  int Choose(size_t head, double* probabilities) const;

  ActionSpace actions_;
  std::vector<int64_t> head_sizes_;
  PolicyNetwork network_;
  DecisionMode mode_;
  uint64_t seed_;
  uint64_t decisions_ = 0;
  FeatureMemory memory_;
  Hyperparameters hyperparameters_{};
  std::vector<double> probabilities_;
};

}  // namespace lhopt
