// The arithmetic of the policy network, once, over the vector that the including unit chose.
#pragma once

#include "policy_kernels.h"
#include "vec.h"

namespace lhopt {
namespace {

using F = Vec::F;

constexpr int64_t kVectorsPerPanel = kPanel / Vec::kWidth;
// Columns in flight, so that sums do not wait for one another: eight accumulators or more.
constexpr int64_t kColumnsAtOnce = kVectorsPerPanel >= 8 ? 1 : 8 / kVectorsPerPanel;
constexpr double kLayerNormEpsilon = 1e-5;

// Adds one column of a panel, times x.
inline void AddColumn(const float* column, float x, F (&sums)[kVectorsPerPanel]) {
  const F factor = Vec::Set(x);
  for (int64_t v = 0; v < kVectorsPerPanel; ++v) {
    sums[v] = Vec::MulAdd(Vec::Load(column + v * Vec::kWidth), factor, sums[v]);
  }
}

inline void PanelAffine(const float* panel, const float* bias, const float* x, int64_t columns,
                        float* out) {
  F sums[kColumnsAtOnce][kVectorsPerPanel];
  for (int64_t k = 0; k < kColumnsAtOnce; ++k) {
    for (int64_t v = 0; v < kVectorsPerPanel; ++v) {
      sums[k][v] = k == 0 ? Vec::Load(bias + v * Vec::kWidth) : Vec::Set(0.0f);
    }
  }
  int64_t column = 0;
  for (; column + kColumnsAtOnce <= columns; column += kColumnsAtOnce) {
    for (int64_t k = 0; k < kColumnsAtOnce; ++k) {
      AddColumn(panel + (column + k) * kPanel, x[column + k], sums[k]);
    }
  }
  for (; column < columns; ++column) AddColumn(panel + column * kPanel, x[column], sums[0]);
  for (int64_t v = 0; v < kVectorsPerPanel; ++v) {
    for (int64_t k = 1; k < kColumnsAtOnce; ++k) sums[0][v] = Vec::Add(sums[0][v], sums[k][v]);
    Vec::Store(out + v * Vec::kWidth, sums[0][v]);
  }
}

void Affine(const float* panels, const float* bias, const float* x, int64_t columns,
            int64_t num_panels, float* out) {
  for (int64_t p = 0; p < num_panels; ++p) {
    PanelAffine(panels + p * kPanel * columns, bias + p * kPanel, x, columns, out + p * kPanel);
  }
}

inline F Clamp(F x, float limit) {
  const F zero = Vec::Set(0.0f);
  const F above = Vec::Max(x, Vec::Set(-limit));
  return Vec::Sub(zero, Vec::Max(Vec::Sub(zero, above), Vec::Set(-limit)));
}

// A rational minimax approximation within 4e-7; the clamp is where it reaches 1 in float32. (The
// coefficients are the ones that Eigen and XLA share.)
inline F Tanh(F x) {
  constexpr float kOdd[] = {-2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f,
                            5.12229709037114e-08f,  1.48572235717979e-05f, 6.37261928875436e-04f,
                            4.89352455891786e-03f};
  constexpr float kEven[] = {1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f,
                             4.89352518554385e-03f};
  x = Clamp(x, 7.90531110763549805f);
  const F square = Vec::Mul(x, x);
  F odd = Vec::Set(kOdd[0]);
  for (int i = 1; i < 7; ++i) odd = Vec::MulAdd(odd, square, Vec::Set(kOdd[i]));
  F even = Vec::Set(kEven[0]);
  for (int i = 1; i < 4; ++i) even = Vec::MulAdd(even, square, Vec::Set(kEven[i]));
  return Vec::Div(Vec::Mul(x, odd), even);
}

inline F Sigmoid(F x) {
  const F half = Vec::Set(0.5f);
  return Vec::MulAdd(Tanh(Vec::Mul(x, half)), half, half);
}

void Relu(float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    Vec::Store(x + i, Vec::Max(Vec::Load(x + i), Vec::Set(0.0f)));
  }
}

void Normalize(const float* x, const float* mean, const float* scale, float clip, int64_t size,
               float* out) {
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    const F centered = Vec::Sub(Vec::Load(x + i), Vec::Load(mean + i));
    Vec::Store(out + i, Clamp(Vec::Mul(centered, Vec::Load(scale + i)), clip));
  }
}

void AddLayerNorm(const float* x, const float* scale, int64_t size, float* out) {
  F sum = Vec::Set(0.0f);
  for (int64_t i = 0; i < size; i += Vec::kWidth) sum = Vec::Add(sum, Vec::Load(x + i));
  const F mean = Vec::Set(static_cast<float>(Vec::Total(sum) / static_cast<double>(size)));
  F squares = Vec::Set(0.0f);
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    const F centered = Vec::Sub(Vec::Load(x + i), mean);
    squares = Vec::MulAdd(centered, centered, squares);
  }
  const double var = Vec::Total(squares) / static_cast<double>(size);
  const F inverse = Vec::Set(static_cast<float>(1.0 / sqrt(var + kLayerNormEpsilon)));
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    const F normalized = Vec::Mul(Vec::Sub(Vec::Load(x + i), mean), inverse);
    Vec::Store(out + i, Vec::MulAdd(normalized, Vec::Load(scale + i), Vec::Load(out + i)));
  }
}

void UpdateCell(const float* gates, int64_t size, float* cell) {
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    const F input = Sigmoid(Vec::Load(gates + i));
    const F forget = Sigmoid(Vec::Load(gates + size + i));
    const F candidate = Tanh(Vec::Load(gates + 2 * size + i));
    Vec::Store(cell + i, Vec::MulAdd(forget, Vec::Load(cell + i), Vec::Mul(input, candidate)));
  }
}

void GatedTanh(const float* gate, const float* x, int64_t size, float* out) {
  for (int64_t i = 0; i < size; i += Vec::kWidth) {
    Vec::Store(out + i, Vec::Mul(Sigmoid(Vec::Load(gate + i)), Tanh(Vec::Load(x + i))));
  }
}

#define LHOPT_DEFINE_POLICY_KERNELS(variable, isa) \
  const PolicyKernels variable = {isa, Affine, Relu, Normalize, AddLayerNorm, UpdateCell, GatedTanh}

}  // namespace
}  // namespace lhopt
