#include "policy_network.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace lhopt {
namespace {

constexpr double kInputEpsilon = 1e-5;
constexpr float kInputClip = 2.0f;
// With weights up to this nothing can overflow: layer norms come before products of products.
constexpr float kLargestWeight = 1e4f;
constexpr float kLargestMean = 1e6f;
constexpr float kLargestVar = 1e13f;
constexpr int64_t kLargestWidth = 2048;

std::string ToString(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

const Weight& Find(const Weights& weights, const std::string& name) {
  const auto found = weights.find(name);
  if (found == weights.end()) throw std::invalid_argument("weight " + name + " is missing");
  return found->second;
}

// The weight's values, checked against a shape and a range.
const float* Take(const Weights& weights, const std::string& name,
                  const std::vector<int64_t>& shape, float low = -kLargestWeight,
                  float high = kLargestWeight) {
  const Weight& weight = Find(weights, name);
  if (weight.shape != shape) {
    throw std::invalid_argument("weight " + name + " has shape " + ToString(weight.shape) +
                                ", expected " + ToString(shape));
  }
  int64_t size = 1;
  for (const int64_t length : shape) size *= length;
  for (int64_t i = 0; i < size; ++i) {
    if (!(weight.data[i] >= low && weight.data[i] <= high)) {
      throw std::invalid_argument("weight " + name + " holds " + std::to_string(weight.data[i]) +
                                  " at " + std::to_string(i) + ", expected a number from " +
                                  std::to_string(low) + " to " + std::to_string(high));
    }
  }
  return weight.data;
}

// A width that another weight's rows give; the kernels need whole panels.
int64_t TakeWidth(const Weights& weights, const std::string& name) {
  const Weight& weight = Find(weights, name);
  const int64_t rows = weight.shape.empty() ? 0 : weight.shape[0];
  if (rows < 1 || rows > kLargestWidth || rows % kPanel != 0) {
    throw std::invalid_argument("weight " + name + " has " + std::to_string(rows) +
                                " rows, expected a multiple of " + std::to_string(kPanel) +
                                " up to " + std::to_string(kLargestWidth));
  }
  return rows;
}

PaddedVector TakeVector(const Weights& weights, const std::string& name, int64_t size) {
  const float* const values = Take(weights, name, {size});
  PaddedVector vector(size);
  std::copy(values, values + size, vector.data());
  return vector;
}

// Rows [0, rows) of name.weight, and name.bias if there is one, as rows of `out` from `first` on.
void PackInto(const Weights& weights, const std::string& name, int64_t rows, int64_t columns,
              bool has_bias, int64_t first, PackedLinear& out) {
  const float* const matrix = Take(weights, name + ".weight", {rows, columns});
  const float* const bias = has_bias ? Take(weights, name + ".bias", {rows}) : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      out.at(first + row, column) = matrix[row * columns + column];
    }
    if (has_bias) out.bias(first + row) = bias[row];
  }
}

PackedLinear Pack(const Weights& weights, const std::string& name, int64_t rows, int64_t columns,
                  bool has_bias = true) {
  PackedLinear linear(rows, columns);
  PackInto(weights, name, rows, columns, has_bias, 0, linear);
  return linear;
}

int64_t WholePanels(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

}  // namespace

PolicyNetwork::PolicyNetwork(const Weights& weights, int64_t features,
                             std::vector<int64_t> head_sizes, const PolicyKernels& kernels)
    : kernels_(kernels),
      num_features_(features),
      hidden_(TakeWidth(weights, "pre.weight")),
      head_hidden_(TakeWidth(weights, "heads.0.down.weight")),
      head_sizes_(std::move(head_sizes)),
      pre_(Pack(weights, "pre", hidden_, features)),
      lstm_input_(Pack(weights, "lstm.input", 4 * hidden_, hidden_, false)),
      lstm_recurrent_(Pack(weights, "lstm.recurrent", 4 * hidden_, hidden_, false)),
      post_(Pack(weights, "post", hidden_, hidden_)),
      input_norm_scale_(TakeVector(weights, "lstm.input_norm.weight", 4 * hidden_)),
      input_norm_shift_(TakeVector(weights, "lstm.input_norm.bias", 4 * hidden_)),
      recurrent_norm_scale_(TakeVector(weights, "lstm.recurrent_norm.weight", 4 * hidden_)),
      cell_norm_scale_(TakeVector(weights, "lstm.cell_norm.weight", hidden_)),
      cell_norm_shift_(TakeVector(weights, "lstm.cell_norm.bias", hidden_)),
      h_(hidden_),
      c_(hidden_),
      input_(features),
      normalized_(features),
      x_(hidden_),
      gates_(4 * hidden_),
      product_(4 * hidden_),
      normalized_cell_(hidden_),
      y_(hidden_) {
  LoadNormalization(weights);
  LoadHeads(weights);
  constexpr size_t kWeightsOutsideHeads = 14, kWeightsPerHead = 6;
  const size_t expected = kWeightsOutsideHeads + kWeightsPerHead * head_sizes_.size();
  if (weights.size() != expected) {
    throw std::invalid_argument("there are " + std::to_string(weights.size()) +
                                " weights, expected " + std::to_string(expected));
  }
}

void PolicyNetwork::LoadNormalization(const Weights& weights) {
  const float* const mean =
      Take(weights, "normalisation.mean", {num_features_}, -kLargestMean, kLargestMean);
  const float* const var = Take(weights, "normalisation.var", {num_features_}, 0.0f, kLargestVar);
  Take(weights, "normalisation.total_weight", {}, 0.0f, 1.0f);  // only training goes on from it
  input_mean_ = PaddedVector(num_features_);
  input_scale_ = PaddedVector(num_features_);
  for (int64_t i = 0; i < num_features_; ++i) {
    input_mean_.data()[i] = mean[i];
    input_scale_.data()[i] = static_cast<float>(1.0 / std::sqrt(var[i] + kInputEpsilon));
  }
}

void PolicyNetwork::LoadHeads(const Weights& weights) {
  int64_t rows = 0;
  for (const int64_t size : head_sizes_) {
    logit_offsets_.push_back(rows);
    rows += WholePanels(size);
  }
  const auto num_heads = static_cast<int64_t>(head_sizes_.size());
  heads_down_ = PackedLinear(num_heads * head_hidden_, hidden_);
  heads_direct_ = PackedLinear(rows, hidden_);
  r_ = PaddedVector(num_heads * head_hidden_);
  logits_ = PaddedVector(rows);
  for (int64_t head = 0; head < num_heads; ++head) {
    const std::string name = "heads." + std::to_string(head);
    PackInto(weights, name + ".down", head_hidden_, hidden_, true, head * head_hidden_,
             heads_down_);
    PackInto(weights, name + ".logits", head_sizes_[head], hidden_, true, logit_offsets_[head],
             heads_direct_);
    heads_folded_.push_back(FoldHead(weights, name + ".up", head));
  }
}

PackedLinear PolicyNetwork::FoldHead(const Weights& weights, const std::string& up, int64_t head) {
  const float* const matrix = Take(weights, up + ".weight", {hidden_, head_hidden_});
  const float* const bias = Take(weights, up + ".bias", {hidden_});
  PackedLinear folded(head_sizes_[head], head_hidden_);
  std::vector<double> products(head_hidden_);
  for (int64_t row = 0; row < head_sizes_[head]; ++row) {
    const int64_t direct_row = logit_offsets_[head] + row;
    double shift = heads_direct_.bias(direct_row);
    std::fill(products.begin(), products.end(), 0.0);
    for (int64_t k = 0; k < hidden_; ++k) {
      const double v = heads_direct_.at(direct_row, k);
      shift += v * bias[k];
      for (int64_t j = 0; j < head_hidden_; ++j) products[j] += v * matrix[k * head_hidden_ + j];
    }
    heads_direct_.bias(direct_row) = static_cast<float>(shift);
    for (int64_t j = 0; j < head_hidden_; ++j) folded.at(row, j) = static_cast<float>(products[j]);
  }
  return folded;
}

void PolicyNetwork::Run() {
  kernels_.normalize(input_.data(), input_mean_.data(), input_scale_.data(), kInputClip,
                     input_.size(), normalized_.data());
  pre_.Apply(kernels_, normalized_.data(), x_.data());
  kernels_.relu(x_.data(), x_.size());
  RunLstm();
  post_.Apply(kernels_, h_.data(), y_.data());
  kernels_.relu(y_.data(), y_.size());
  RunHeads();
}

void PolicyNetwork::RunLstm() {
  const int64_t size = 4 * hidden_;
  const float* const shift = input_norm_shift_.data();
  std::copy(shift, shift + size, gates_.data());
  lstm_input_.Apply(kernels_, x_.data(), product_.data());
  kernels_.add_layer_norm(product_.data(), input_norm_scale_.data(), size, gates_.data());
  lstm_recurrent_.Apply(kernels_, h_.data(), product_.data());
  kernels_.add_layer_norm(product_.data(), recurrent_norm_scale_.data(), size, gates_.data());
  kernels_.update_cell(gates_.data(), hidden_, c_.data());
  const float* const cell_shift = cell_norm_shift_.data();
  std::copy(cell_shift, cell_shift + hidden_, normalized_cell_.data());
  kernels_.add_layer_norm(c_.data(), cell_norm_scale_.data(), hidden_, normalized_cell_.data());
  kernels_.gated_tanh(gates_.data() + 3 * hidden_, normalized_cell_.data(), hidden_, h_.data());
}

void PolicyNetwork::RunHeads() {
  heads_down_.Apply(kernels_, y_.data(), r_.data());
  kernels_.relu(r_.data(), r_.size());
  heads_direct_.Apply(kernels_, y_.data(), logits_.data());
  for (size_t head = 0; head < heads_folded_.size(); ++head) {
    heads_folded_[head].Add(kernels_, r_.data() + head * head_hidden_,
                            logits_.data() + logit_offsets_[head]);
  }
}

}  // namespace lhopt
