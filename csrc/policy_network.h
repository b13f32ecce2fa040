// The policy network for one run: the twin of lhopt_fused/policy/network.py, in float32.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "policy_kernels.h"

namespace lhopt {

// One named array of the network, row after row.
struct Weight {
  const float* data;
  std::vector<int64_t> shape;
};
using Weights = std::map<std::string, Weight>;

// Floats in units that are aligned for every instruction set.
class PaddedVector {
 public:
  PaddedVector() = default;
  explicit PaddedVector(int64_t size) : units_((size + kPanel - 1) / kPanel) {}

  float* data() { return units_.empty() ? nullptr : units_.front().lanes; }
  const float* data() const { return units_.empty() ? nullptr : units_.front().lanes; }
  int64_t size() const { return static_cast<int64_t>(units_.size()) * kPanel; }

 private:
  struct alignas(64) Unit {
    float lanes[kPanel] = {};
  };
  std::vector<Unit> units_;
};

// W and b, packed into panels of 16 rows (see PolicyKernels::affine).
class PackedLinear {
 public:
  PackedLinear() = default;
  PackedLinear(int64_t rows, int64_t columns)
      : columns_(columns), bias_(rows), panels_(bias_.size() * columns) {}

  float& at(int64_t row, int64_t column) {
    return panels_.data()[(row / kPanel * columns_ + column) * kPanel + row % kPanel];
  }
  float& bias(int64_t row) { return bias_.data()[row]; }

  // out = b + W x.
  void Apply(const PolicyKernels& kernels, const float* x, float* out) const {
    kernels.affine(panels_.data(), bias_.data(), x, columns_, bias_.size() / kPanel, out);
  }
  // out += W x.
  void Add(const PolicyKernels& kernels, const float* x, float* out) const {
    kernels.affine(panels_.data(), out, x, columns_, bias_.size() / kPanel, out);
  }

 private:
  int64_t columns_ = 0;
  PaddedVector bias_;
  PaddedVector panels_;
};

class PolicyNetwork {
 public:
  // Takes copies of all weights. Throws std::invalid_argument, naming the weight, where a name,
  // shape or value is not what a network with these inputs and heads has.
  PolicyNetwork(const Weights& weights, int64_t features, std::vector<int64_t> head_sizes,
                const PolicyKernels& kernels);

  // One outer step: `features()` to `logits()`, moving the memory.
  void Run();

  float* features() { return input_.data(); }
  const float* features() const { return input_.data(); }
  const float* logits(size_t head) const { return logits_.data() + logit_offsets_[head]; }

  int64_t hidden() const { return hidden_; }
  float* h() { return h_.data(); }
  const float* h() const { return h_.data(); }
  float* c() { return c_.data(); }
  const float* c() const { return c_.data(); }
  const char* isa() const { return kernels_.name; }

 private:
  void LoadNormalization(const Weights& weights);
  void LoadHeads(const Weights& weights);
  // V W_2 of one head, whose V is in heads_direct_ already; adds V b_2 to the bias there.
  PackedLinear FoldHead(const Weights& weights, const std::string& up, int64_t head);
  void RunLstm();
  void RunHeads();

  const PolicyKernels& kernels_;
  int64_t num_features_;
  int64_t hidden_;
  int64_t head_hidden_;
  std::vector<int64_t> head_sizes_;

  PaddedVector input_mean_, input_scale_;
  PackedLinear pre_, lstm_input_, lstm_recurrent_, post_;
  PaddedVector input_norm_scale_, input_norm_shift_, recurrent_norm_scale_;
  PaddedVector cell_norm_scale_, cell_norm_shift_;
  // The last two maps of a head are linear, so that with r = relu(W_1 y + b_1)
  //   V (y + W_2 r + b_2) + b = V y + (V W_2) r + (V b_2 + b):
  PackedLinear heads_down_;                 // all W_1, one below the other
  PackedLinear heads_direct_;               // all V, each padded to whole panels
  std::vector<PackedLinear> heads_folded_;  // V W_2
  std::vector<int64_t> logit_offsets_;

  PaddedVector h_, c_;
  PaddedVector input_, normalized_, x_, gates_, product_, normalized_cell_, y_, r_, logits_;
};

}  // namespace lhopt
