#include "policy_network.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
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

void LoadVector(const Weights& weights, const std::string& name, int64_t size, PaddedVector& out) {
  const float* const values = Take(weights, name, {size});
  std::copy(values, values + size, out.data());
}

// name.weight into the rows of `out` from `first` on.
void LoadMatrix(const Weights& weights, const std::string& name, int64_t rows, int64_t columns,
                PackedLinear& out, int64_t first = 0) {
  const float* const matrix = Take(weights, name + ".weight", {rows, columns});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      out.at(first + row, column) = matrix[row * columns + column];
    }
  }
}

// Likewise with name.bias.
void LoadLinear(const Weights& weights, const std::string& name, int64_t rows, int64_t columns,
                PackedLinear& out, int64_t first = 0) {
  LoadMatrix(weights, name, rows, columns, out, first);
  const float* const bias = Take(weights, name + ".bias", {rows});
  for (int64_t row = 0; row < rows; ++row) out.bias(first + row) = bias[row];
}

int64_t WholePanels(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

}  // namespace

PaddedVector Arena::Take(int64_t size) {
  const int64_t first = used_;
  used_ += WholePanels(size);
  return {block_ ? block_.get() + first : nullptr, used_ - first};
}

void Arena::Allocate() {
  constexpr size_t kLine = kPanel * sizeof(float), kHugePage = size_t{2} << 20;
  size_t bytes = static_cast<size_t>(used_) * sizeof(float);
  const bool is_large = bytes >= kHugePage / 2;
  if (is_large) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const std::align_val_t alignment{is_large ? kHugePage : kLine};
  block_ = {static_cast<float*>(::operator new(bytes, alignment)), Free{alignment}};
#if defined(__linux__)
  if (is_large) madvise(block_.get(), bytes, MADV_HUGEPAGE);  // where it is refused: only slower
#endif
  std::memset(block_.get(), 0, bytes);
  used_ = 0;
}

PolicyNetwork::PolicyNetwork(const Weights& weights, int64_t features,
                             std::vector<int64_t> head_sizes, const PolicyKernels& kernels)
    : kernels_(kernels),
      num_features_(features),
      hidden_(TakeWidth(weights, "pre.weight")),
      head_hidden_(TakeWidth(weights, "heads.0.down.weight")),
      head_sizes_(std::move(head_sizes)) {
  for (const int64_t size : head_sizes_) {
    logit_offsets_.push_back(num_logits_);
    num_logits_ += size;
  }
  LayOut();
  arena_.Allocate();
  LayOut();
  LoadNormalization(weights);
  LoadLinear(weights, "pre", hidden_, features, pre_);
  LoadLstm(weights);
  LoadLinear(weights, "post", hidden_, hidden_, post_);
  LoadHeads(weights);
  constexpr size_t kWeightsOutsideHeads = 14, kWeightsPerHead = 6;
  const size_t expected = kWeightsOutsideHeads + kWeightsPerHead * head_sizes_.size();
  if (weights.size() != expected) {
    throw std::invalid_argument("there are " + std::to_string(weights.size()) +
                                " weights, expected " + std::to_string(expected));
  }
}

void PolicyNetwork::LayOut() {
  const auto place = [this](PaddedVector& vector, int64_t size) { vector = arena_.Take(size); };
  const auto place_linear = [this](PackedLinear& linear, int64_t rows, int64_t columns) {
    linear = PackedLinear(arena_, rows, columns);
  };
  const int64_t all_heads_hidden = static_cast<int64_t>(head_sizes_.size()) * head_hidden_;
  for (PaddedVector* vector : {&input_, &input_mean_, &input_scale_, &normalized_}) {
    place(*vector, num_features_);
  }
  place_linear(pre_, hidden_, num_features_);
  place(x_, hidden_);
  place_linear(lstm_input_, 4 * hidden_, hidden_);
  for (PaddedVector* vector :
       {&product_, &gates_, &input_norm_shift_, &input_norm_scale_, &recurrent_norm_scale_}) {
    place(*vector, 4 * hidden_);
  }
  place_linear(lstm_recurrent_, 4 * hidden_, hidden_);
  for (PaddedVector* vector : {&h_, &c_, &cell_norm_shift_, &cell_norm_scale_, &normalized_cell_}) {
    place(*vector, hidden_);
  }
  place_linear(post_, hidden_, hidden_);
  place(y_r_, hidden_ + all_heads_hidden);
  place_linear(heads_down_, all_heads_hidden, hidden_);
  place_linear(heads_out_, num_logits_, hidden_ + all_heads_hidden);
  place(logits_, num_logits_);
}

void PolicyNetwork::LoadNormalization(const Weights& weights) {
  const float* const mean =
      Take(weights, "normalisation.mean", {num_features_}, -kLargestMean, kLargestMean);
  const float* const var = Take(weights, "normalisation.var", {num_features_}, 0.0f, kLargestVar);
  Take(weights, "normalisation.total_weight", {}, 0.0f, 1.0f);  // only training goes on from it
  for (int64_t i = 0; i < num_features_; ++i) {
    input_mean_.data()[i] = mean[i];
    input_scale_.data()[i] = static_cast<float>(1.0 / std::sqrt(var[i] + kInputEpsilon));
  }
}

void PolicyNetwork::LoadLstm(const Weights& weights) {
  const int64_t size = 4 * hidden_;
  LoadMatrix(weights, "lstm.input", size, hidden_, lstm_input_);
  LoadMatrix(weights, "lstm.recurrent", size, hidden_, lstm_recurrent_);
  LoadVector(weights, "lstm.input_norm.weight", size, input_norm_scale_);
  LoadVector(weights, "lstm.input_norm.bias", size, input_norm_shift_);
  LoadVector(weights, "lstm.recurrent_norm.weight", size, recurrent_norm_scale_);
  LoadVector(weights, "lstm.cell_norm.weight", hidden_, cell_norm_scale_);
  LoadVector(weights, "lstm.cell_norm.bias", hidden_, cell_norm_shift_);
}

void PolicyNetwork::LoadHeads(const Weights& weights) {
  for (size_t head = 0; head < head_sizes_.size(); ++head) {
    const std::string name = "heads." + std::to_string(head);
    const auto first = static_cast<int64_t>(head) * head_hidden_;
    LoadLinear(weights, name + ".down", head_hidden_, hidden_, heads_down_, first);
    LoadLinear(weights, name + ".logits", head_sizes_[head], hidden_, heads_out_,
               logit_offsets_[head]);
    FoldHead(weights, name + ".up", head);
  }
}

void PolicyNetwork::FoldHead(const Weights& weights, const std::string& up, size_t head) {
  const float* const matrix = Take(weights, up + ".weight", {hidden_, head_hidden_});
  const float* const bias = Take(weights, up + ".bias", {hidden_});
  const int64_t first_column = hidden_ + static_cast<int64_t>(head) * head_hidden_;
  std::vector<double> products(head_hidden_);
  for (int64_t i = 0; i < head_sizes_[head]; ++i) {
    const int64_t row = logit_offsets_[head] + i;
    double shift = heads_out_.bias(row);
    std::fill(products.begin(), products.end(), 0.0);
    for (int64_t k = 0; k < hidden_; ++k) {
      const double v = heads_out_.at(row, k);
      shift += v * bias[k];
      for (int64_t j = 0; j < head_hidden_; ++j) products[j] += v * matrix[k * head_hidden_ + j];
    }
    heads_out_.bias(row) = static_cast<float>(shift);
    for (int64_t j = 0; j < head_hidden_; ++j) {
      heads_out_.at(row, first_column + j) = static_cast<float>(products[j]);
    }
  }
}

void PolicyNetwork::Run() {
  kernels_.normalize(input_.data(), input_mean_.data(), input_scale_.data(), kInputClip,
                     input_.size(), normalized_.data());
  pre_.Apply(kernels_, normalized_.data(), x_.data());
  kernels_.relu(x_.data(), x_.size());
  RunLstm();
  float* const y = y_r_.data();
  float* const r = y + hidden_;
  post_.Apply(kernels_, h_.data(), y);
  kernels_.relu(y, hidden_);
  heads_down_.Apply(kernels_, y, r);
  kernels_.relu(r, y_r_.size() - hidden_);
  heads_out_.Apply(kernels_, y, logits_.data());
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

}  // namespace lhopt
