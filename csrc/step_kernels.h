// The arithmetic of the step, once, over the vector that the including unit chose.
#pragma once

#include "vec.h"

namespace lhopt {
namespace {

using F = Vec::F;

// Lane sums are float32 for this many vectors and then flushed to float64: it bounds their error.
constexpr int64_t kVectorsPerFlush = 128;
// Factors in [1, 2) whose product cannot leave the range of float32.
constexpr int64_t kFactorsPerProduct = 64;
constexpr int32_t kExponentBias = 127;

int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Coefficients, one vector each.
struct Broadcast {
  explicit Broadcast(const Coefficients& c)
      : grad_scale(Vec::Set(c.grad_scale)),
        beta1(Vec::Set(c.beta1)),
        ombeta1(Vec::Set(c.ombeta1)),
        beta2(Vec::Set(c.beta2)),
        ombeta2(Vec::Set(c.ombeta2)),
        inv_bias_correction1(Vec::Set(c.inv_bias_correction1)),
        inv_sqrt_bias_correction2(Vec::Set(c.inv_sqrt_bias_correction2)),
        epsilon(Vec::Set(c.epsilon)),
        weight_decay(Vec::Set(c.weight_decay)),
        decay_factor(Vec::Set(c.decay_factor)),
        step_size(Vec::Set(c.step_size)) {}

  F grad_scale, beta1, ombeta1, beta2, ombeta2, inv_bias_correction1, inv_sqrt_bias_correction2;
  F epsilon, weight_decay, decay_factor, step_size;
};

// Sum of log x over positive x as the log of products: mantissas multiply, exponents add.
class LogSum {
 public:
  LogSum() : product_(Vec::Set(1.0f)), exponent_(Vec::Zero()) {}

  void Add(F x) { product_ = Vec::Mul(product_, Vec::TakeExponent(x, exponent_)); }

  // To be called every kFactorsPerProduct additions.
  void Renormalize() { product_ = Vec::TakeExponent(product_, exponent_); }

  // `taken`: calls of Add and Renormalize. One logarithm for all lanes.
  double Total(int64_t taken) const {
    float lanes[Vec::kWidth];
    Vec::Store(lanes, product_);
    double product = 1.0;
    int64_t exponent = Vec::Total(exponent_) - kExponentBias * taken * Vec::kWidth;
    for (int64_t lane = 0; lane < Vec::kWidth; ++lane) {
      int power;
      product = frexp(product * lanes[lane], &power);
      exponent += power;
    }
    return log(product) + 0.693147180559945309 * static_cast<double>(exponent);
  }

 private:
  F product_;
  Vec::I exponent_;
};

// The running sums of one block, by lane; see Sums. (An implicit constructor would be compiled
// for the baseline instruction set.)
struct LaneSums {
  LaneSums() : count_gt_epsilon(Vec::Zero()), count_same_sign_momentum(Vec::Zero()) {
    param_sq = update_sq = new_param_sq = Vec::Set(0.0f);
    grad_sq = m_sq = m_hat_minus_grad_sq = Vec::Set(0.0f);
    grad_dot_param = grad_dot_m = grad_dot_update = Vec::Set(0.0f);
    grad_dot_momentum = momentum_sq = Vec::Set(0.0f);
  }

  F param_sq, update_sq, new_param_sq;
  F grad_sq, m_sq, m_hat_minus_grad_sq;
  F grad_dot_param, grad_dot_m, grad_dot_update;
  F grad_dot_momentum, momentum_sq;
  LogSum log_abs_update;
  Vec::I count_gt_epsilon, count_same_sign_momentum;

  void AddNorms(Sums& sums) const {
    sums.param_sq += Vec::Total(param_sq);
    sums.update_sq += Vec::Total(update_sq);
    sums.new_param_sq += Vec::Total(new_param_sq);
  }

  void AddStatistics(int64_t logs_taken, Sums& sums) const {
    const double update_sq_total = Vec::Total(update_sq);
    sums.grad_sq += Vec::Total(grad_sq);
    sums.m_sq += Vec::Total(m_sq);
    sums.m_hat_minus_grad_sq += Vec::Total(m_hat_minus_grad_sq);
    sums.grad_dot_param += Vec::Total(grad_dot_param);
    sums.grad_dot_m += Vec::Total(grad_dot_m);
    sums.grad_dot_update += Vec::Total(grad_dot_update);
    sums.grad_dot_momentum += Vec::Total(grad_dot_momentum);
    sums.momentum_sq += Vec::Total(momentum_sq);
    // Exponent bits know no NaN or inf; the squares of the same numbers do.
    sums.sum_log_abs_update +=
        isfinite(update_sq_total) ? log_abs_update.Total(logs_taken) : update_sq_total;
    sums.count_gt_epsilon += static_cast<double>(Vec::Total(count_gt_epsilon));
    sums.count_same_sign_momentum += static_cast<double>(Vec::Total(count_same_sign_momentum));
  }
};

// s, from the second moment as stored.
template <Denominator kDenominator>
F DenominatorOf(F v, const Broadcast& c) {
  if constexpr (kDenominator == Denominator::kMax) return v;
  return Vec::Mul(Vec::Sqrt(v), c.inv_sqrt_bias_correction2);
}

// u
F UpdateOf(F m_hat, F s, F p, const Broadcast& c) {
  return Vec::MulAdd(c.weight_decay, p, Vec::Div(m_hat, Vec::Add(s, c.epsilon)));
}

// p <- a p - lr T u, and the sum of its squares as stored
template <class P>
void StoreParam(P* out, F p, F u, const Broadcast& c, LaneSums& sums) {
  const F exact = Vec::NegMulAdd(c.step_size, u, Vec::Mul(p, c.decay_factor));
  const F stored = Vec::Store(out, exact);
  sums.new_param_sq = Vec::MulAdd(stored, stored, sums.new_param_sq);
}

// One vector of the step.
template <class P, class G, Denominator kDenominator, bool kStatistics, bool kApply>
void UpdateVector(const Slice& slice, int64_t i, const Broadcast& c, LaneSums& sums) {
  P* const param = static_cast<P*>(slice.param) + i;
  const F g = Vec::Mul(Vec::Load(static_cast<const G*>(slice.grad) + i), c.grad_scale);
  const F p = Vec::Load(param);
  const F momentum = Vec::Load(slice.exp_avg + i);
  const F v_before = Vec::Mul(Vec::Load(slice.exp_avg_sq + i), c.beta2);

  const F m = Vec::MulAdd(momentum, c.beta1, Vec::Mul(g, c.ombeta1));
  const F v = kDenominator == Denominator::kMax ? Vec::Max(v_before, Vec::Abs(g))
                                                : Vec::MulAdd(Vec::Mul(g, c.ombeta2), g, v_before);
  const F m_hat = Vec::Mul(m, c.inv_bias_correction1);
  const F s = DenominatorOf<kDenominator>(v, c);
  const F u = UpdateOf(m_hat, s, p, c);
  Vec::Store(slice.exp_avg + i, m);
  Vec::Store(slice.exp_avg_sq + i, v);
  if constexpr (kApply) StoreParam(param, p, u, c, sums);

  sums.param_sq = Vec::MulAdd(p, p, sums.param_sq);
  sums.update_sq = Vec::MulAdd(u, u, sums.update_sq);
  if constexpr (kStatistics) {
    const F zero = Vec::Set(0.0f);
    const F noise = Vec::Sub(m_hat, g);
    sums.grad_sq = Vec::MulAdd(g, g, sums.grad_sq);
    sums.m_sq = Vec::MulAdd(m, m, sums.m_sq);
    sums.m_hat_minus_grad_sq = Vec::MulAdd(noise, noise, sums.m_hat_minus_grad_sq);
    sums.grad_dot_param = Vec::MulAdd(g, p, sums.grad_dot_param);
    sums.grad_dot_m = Vec::MulAdd(g, m, sums.grad_dot_m);
    sums.grad_dot_update = Vec::MulAdd(g, u, sums.grad_dot_update);
    sums.grad_dot_momentum = Vec::MulAdd(g, momentum, sums.grad_dot_momentum);
    sums.momentum_sq = Vec::MulAdd(momentum, momentum, sums.momentum_sq);
    sums.log_abs_update.Add(Vec::Add(Vec::Abs(u), Vec::Set(1e-8f)));
    sums.count_gt_epsilon = Vec::Count(sums.count_gt_epsilon, Vec::Less(c.epsilon, s));
    sums.count_same_sign_momentum = Vec::Count(
        sums.count_same_sign_momentum, Vec::Same(Vec::Less(g, zero), Vec::Less(momentum, zero)));
  }
}

template <class P, class G, Denominator kDenominator, bool kStatistics, bool kApply>
void Update(const Slice& slice, const Coefficients& coefficients, Sums& sums) {
  const Broadcast c(coefficients);
  for (int64_t i = 0; i < slice.size;) {
    LaneSums lanes;
    const int64_t end = Smaller(i + kVectorsPerFlush * Vec::kWidth, slice.size);
    int64_t logs_taken = (end - i) / Vec::kWidth;
    while (i < end) {
      const int64_t stop = Smaller(i + kFactorsPerProduct * Vec::kWidth, end);
      for (; i < stop; i += Vec::kWidth) {
        UpdateVector<P, G, kDenominator, kStatistics, kApply>(slice, i, c, lanes);
      }
      lanes.log_abs_update.Renormalize();
      ++logs_taken;
    }
    lanes.AddNorms(sums);
    if constexpr (kStatistics) lanes.AddStatistics(logs_taken, sums);
  }
}

// The parameters' update alone, once the trust ratio is known; sums only `new_param_sq`.
template <class P, Denominator kDenominator>
void Apply(const Slice& slice, const Coefficients& coefficients, Sums& sums) {
  const Broadcast c(coefficients);
  for (int64_t i = 0; i < slice.size;) {
    LaneSums lanes;
    const int64_t end = Smaller(i + kVectorsPerFlush * Vec::kWidth, slice.size);
    for (; i < end; i += Vec::kWidth) {
      P* const param = static_cast<P*>(slice.param) + i;
      const F p = Vec::Load(param);
      const F m_hat = Vec::Mul(Vec::Load(slice.exp_avg + i), c.inv_bias_correction1);
      const F s = DenominatorOf<kDenominator>(Vec::Load(slice.exp_avg_sq + i), c);
      StoreParam(param, p, UpdateOf(m_hat, s, p, c), c, lanes);
    }
    sums.new_param_sq += Vec::Total(lanes.new_param_sq);
  }
}

template <class G>
double SumOfSquares(const void* grad, int64_t size, float scale) {
  constexpr int kLanes = 4;  // independent sums, to hide the latency of an addition
  const G* const g = static_cast<const G*>(grad);
  const F scales = Vec::Set(scale);
  const int64_t whole = size - size % (kLanes * Vec::kWidth);
  double total = 0.0;
  int64_t i = 0;
  while (i < whole) {
    F sums[kLanes] = {Vec::Set(0.0f), Vec::Set(0.0f), Vec::Set(0.0f), Vec::Set(0.0f)};
    const int64_t end = Smaller(i + kLanes * kVectorsPerFlush * Vec::kWidth, whole);
    for (; i < end; i += kLanes * Vec::kWidth) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const F x = Vec::Mul(Vec::Load(g + i + lane * Vec::kWidth), scales);
        sums[lane] = Vec::MulAdd(x, x, sums[lane]);
      }
    }
    total += Vec::Total(sums[0]) + Vec::Total(sums[1]) + Vec::Total(sums[2]) + Vec::Total(sums[3]);
  }
  for (; i < size; ++i) {
    const float x = ToFloat(g[i]) * scale;
    total += static_cast<double>(x * x);
  }
  return total;
}

template <class G>
int64_t PackSigns(const void* grad, int64_t size, float scale, uint8_t* bits) {
  constexpr int64_t kStride = Vec::kWidth < 8 ? 8 : Vec::kWidth;  // elements that fill whole bytes
  const G* const g = static_cast<const G*>(grad);
  const F scales = Vec::Set(scale), zero = Vec::Set(0.0f);
  int64_t changed = 0, i = 0;
  const auto replace = [&](int64_t byte, uint32_t packed) {
    changed += __builtin_popcount(bits[byte] ^ packed);
    bits[byte] = static_cast<uint8_t>(packed);
  };
  for (; i + kStride <= size; i += kStride) {
    uint32_t packed = 0;
    for (int64_t j = 0; j < kStride; j += Vec::kWidth) {
      packed |= Vec::Bits(Vec::Less(Vec::Mul(Vec::Load(g + i + j), scales), zero)) << j;
    }
    for (int64_t j = 0; j < kStride; j += 8) replace((i + j) / 8, (packed >> j) & 0xffu);
  }
  for (; i < size; i += 8) {
    uint32_t packed = 0;
    for (int64_t j = 0; j < Smaller(8, size - i); ++j) {
      packed |= uint32_t{ToFloat(g[i + j]) * scale < 0.0f} << j;
    }
    replace(i / 8, packed);
  }
  return size - changed;
}

// The tables below spell out what the driver indexes; see kernels.h for the axes.

#define LHOPT_UPDATE_DENOMINATOR(P, G, D)                            \
  {                                                                  \
    {Update<P, G, D, false, false>, Update<P, G, D, false, true>}, { \
      Update<P, G, D, true, false>, Update<P, G, D, true, true>      \
    }                                                                \
  }
#define LHOPT_UPDATE_GRAD(P, G)                       \
  {LHOPT_UPDATE_DENOMINATOR(P, G, Denominator::kRms), \
   LHOPT_UPDATE_DENOMINATOR(P, G, Denominator::kMax)}
#define LHOPT_UPDATE_PARAM(P) \
  {LHOPT_UPDATE_GRAD(P, float), LHOPT_UPDATE_GRAD(P, BFloat16), LHOPT_UPDATE_GRAD(P, Float16)}
#define LHOPT_APPLY_PARAM(P) {Apply<P, Denominator::kRms>, Apply<P, Denominator::kMax>}

#define LHOPT_DEFINE_KERNELS(variable, isa)                                                   \
  const Kernels variable = {                                                                  \
      isa,                                                                                    \
      Vec::kWidth,                                                                            \
      {LHOPT_UPDATE_PARAM(float), LHOPT_UPDATE_PARAM(BFloat16), LHOPT_UPDATE_PARAM(Float16)}, \
      {LHOPT_APPLY_PARAM(float), LHOPT_APPLY_PARAM(BFloat16), LHOPT_APPLY_PARAM(Float16)},    \
      {SumOfSquares<float>, SumOfSquares<BFloat16>, SumOfSquares<Float16>},                   \
      {PackSigns<float>, PackSigns<BFloat16>, PackSigns<Float16>}}

}  // namespace
}  // namespace lhopt
