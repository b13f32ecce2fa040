// The policy network for one run: the twin of lhopt_fused/policy/network.py, in float32.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <new>
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

// A place for floats, padded to whole panels, in memory that someone else owns.
class PaddedVector {
 public:
  PaddedVector() = default;
  PaddedVector(float* data, int64_t size) : data_(data), size_(size) {}

  float* data() { return data_; }
  const float* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// One block of zeros, handed out in order. Lay out once to count, Allocate, lay out again.
class Arena {
 public:
  PaddedVector Take(int64_t size);
  // On huge pages where there are any: a decision reads all weights once, and with small pages
  // waits for page walks, and for prefetches that end at every page.
  void Allocate();

 private:
  struct Free {
    std::align_val_t alignment;
    void operator()(float* block) const { ::operator delete(block, alignment); }
  };
  std::unique_ptr<float[], Free> block_;
  int64_t used_ = 0;
};

// W and b, packed into panels of 16 rows (see PolicyKernels::affine).
class PackedLinear {
 public:
  PackedLinear() = default;
  PackedLinear(Arena& arena, int64_t rows, int64_t columns)
      : columns_(columns), bias_(arena.Take(rows)), panels_(arena.Take(bias_.size() * columns)) {}

  float& at(int64_t row, int64_t column) {
    return panels_.data()[(row / kPanel * columns_ + column) * kPanel + row % kPanel];
  }
  float& bias(int64_t row) { return bias_.data()[row]; }

  // out = b + W x.
  void Apply(const PolicyKernels& kernels, const float* x, float* out) const {
    kernels.affine(panels_.data(), bias_.data(), x, columns_, bias_.size() / kPanel, out);
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
  // Places everything, in the order in which a decision reads it.
  void LayOut();
  void LoadNormalization(const Weights& weights);
  void LoadLstm(const Weights& weights);
  void LoadHeads(const Weights& weights);
  // V W_2 and V b_2 + b of one head, whose V and b are in heads_out_ already.
  void FoldHead(const Weights& weights, const std::string& up, size_t head);
  void RunLstm();

  const PolicyKernels& kernels_;
  int64_t num_features_;
  int64_t hidden_;
  int64_t head_hidden_;
  std::vector<int64_t> head_sizes_;
  std::vector<int64_t> logit_offsets_;
  int64_t num_logits_ = 0;

  Arena arena_;
  PaddedVector input_mean_, input_scale_;
  PackedLinear pre_, lstm_input_, lstm_recurrent_, post_;
  PaddedVector input_norm_scale_, input_norm_shift_, recurrent_norm_scale_;
  PaddedVector cell_norm_scale_, cell_norm_shift_;
  // The last two maps of a head are linear, so that with r = relu(W_1 y + b_1)
  //   V (y + W_2 r + b_2) + b = V y + (V W_2) r + (V b_2 + b):
  PackedLinear heads_down_;  // all W_1, one below the other
  PackedLinear heads_out_;   // all V, one below the other; beside them V W_2, in blocks

  PaddedVector h_, c_;
  PaddedVector input_, normalized_, x_, gates_, product_, normalized_cell_, logits_;
  PaddedVector y_r_;  // y, and r of all heads after it
};

}  // namespace lhopt
