// The arithmetic of the step, once, over the vector that the including unit chose.
#pragma once

#include "formats.h"

namespace lhopt {
namespace {

// Coefficients, one vector each.
struct Broadcast {
  explicit Broadcast(const Coefficients& c)
      : grad_scale(Vec::Set(c.grad_scale)),
        beta1(Vec::Set(c.beta1)),
        ombeta1(Vec::Set(c.ombeta1)),
        ombeta2(Vec::Set(c.ombeta2)),
        inv_bias_correction1(Vec::Set(c.inv_bias_correction1)),
        denominator_scale(Vec::Set(c.denominator_scale)),
        denominator_offset(Vec::Set(c.denominator_offset)),
        denominator_threshold(Vec::Set(c.denominator_threshold)),
        weight_decay(Vec::Set(c.weight_decay)),
        decay_factor(Vec::Set(c.decay_factor)),
        step_size(Vec::Set(c.step_size)) {}

  F grad_scale, beta1, ombeta1, ombeta2, inv_bias_correction1;
  F denominator_scale, denominator_offset, denominator_threshold;
  F weight_decay, decay_factor, step_size;
};

// Sum of log x over x >= 1e-8 as the log of products whose exponents are taken out and added up.
// The product of an x with one below 2 overflows only where x^2 does too.
class LogSum {
 public:
  LogSum() : product_(Vec::Set(1.0f)), exponent_(Vec::SetInts(0)) {}

  LHOPT_INLINE void Add(F x) {
    product_ = TakeExponent(Vec::Mul(product_, x), exponent_);
    ++count_;
  }

  // One logarithm for all lanes.
  LHOPT_INLINE double Total() const {
    constexpr int64_t kBias = 126;
    float lanes[Vec::kWidth];
    Vec::Store(lanes, product_);
    double product = 1.0;  // of up to 16 lanes, each at least 1/2
    for (int64_t lane = 0; lane < Vec::kWidth; ++lane) product *= lanes[lane];
    const int64_t exponent = Vec::Total(exponent_) - kBias * count_ * Vec::kWidth;
    return log(product) + 0.693147180559945309 * static_cast<double>(exponent);
  }

 private:
  F product_;
  Vec::I exponent_;
  int64_t count_ = 0;
};

// The running sums of one block, by lane; see Sums. (An implicit constructor would be compiled
// for the baseline instruction set.)
struct LaneSums {
  LaneSums() : count_gt_epsilon{}, count_same_sign_momentum{} {
    param_sq = update_sq = new_param_sq = Vec::Set(0.0f);
    grad_sq = m_sq = m_hat_minus_grad_sq = Vec::Set(0.0f);
    grad_dot_param = grad_dot_update = Vec::Set(0.0f);
    grad_dot_momentum = momentum_sq = Vec::Set(0.0f);
  }

  F param_sq, update_sq, new_param_sq;
  F grad_sq, m_sq, m_hat_minus_grad_sq;
  F grad_dot_param, grad_dot_update;
  F grad_dot_momentum, momentum_sq;
  LogSum log_abs_update;
  Vec::Counter count_gt_epsilon, count_same_sign_momentum;
};

// By value, so that what is summed up in the loops stays in registers.
__attribute__((noinline)) void AddNorms(LaneSums lanes, Sums& sums) {
  sums.param_sq += Vec::Total(lanes.param_sq);
  sums.update_sq += Vec::Total(lanes.update_sq);
  sums.new_param_sq += Vec::Total(lanes.new_param_sq);
}

__attribute__((noinline)) void AddStatistics(LaneSums lanes, Sums& sums) {
  const double update_sq = Vec::Total(lanes.update_sq);
  sums.grad_sq += Vec::Total(lanes.grad_sq);
  sums.m_sq += Vec::Total(lanes.m_sq);
  sums.m_hat_minus_grad_sq += Vec::Total(lanes.m_hat_minus_grad_sq);
  sums.grad_dot_param += Vec::Total(lanes.grad_dot_param);
  sums.grad_dot_update += Vec::Total(lanes.grad_dot_update);
  sums.grad_dot_momentum += Vec::Total(lanes.grad_dot_momentum);
  sums.momentum_sq += Vec::Total(lanes.momentum_sq);
  // Exponent bits know no NaN or inf; the squares of the same numbers do.
  sums.sum_log_abs_update += isfinite(update_sq) ? lanes.log_abs_update.Total() : update_sq;
  sums.count_gt_epsilon += static_cast<double>(Vec::Total(lanes.count_gt_epsilon));
  sums.count_same_sign_momentum += static_cast<double>(Vec::Total(lanes.count_same_sign_momentum));
}

// r: what the denominator is a multiple of.
template <Denominator kDenominator>
LHOPT_INLINE F RootOf(F v) {
  if constexpr (kDenominator == Denominator::kMax) return v;
  return Vec::Sqrt(v);
}

// u
LHOPT_INLINE F UpdateOf(F m, F root, F p, const Broadcast& c) {
  const F denominator = Vec::MulAdd(root, c.denominator_scale, c.denominator_offset);
  return Vec::MulAdd(c.weight_decay, p, Vec::Div(m, denominator));
}

// p <- a p - lr T u
LHOPT_INLINE F NewParam(F p, F u, const Broadcast& c) {
  return Vec::NegMulAdd(c.step_size, u, Vec::Mul(p, c.decay_factor));
}

// Moments that lose bits are written once the parameters are: till then the step can be taken
// again.
template <class M, Pass kPass>
constexpr bool kWritesMoments = M::kIsExact || kPass != Pass::kMomentsOnly;

// One vector of the step between its halves.
struct Fresh {
  F g, p, m, root;
};

// The first half: moments.
template <Denominator kDenominator, bool kStatistics, Pass kPass, class W, class G, class M>
LHOPT_INLINE Fresh UpdateMoments(const W& weights, const G* grad, M& moments, int64_t i,
                                 const Broadcast& c, LaneSums& sums) {
  const F g = Vec::Mul(Load(grad + i), c.grad_scale);
  const F p = weights.Read(i);
  const F momentum = moments.ReadFirst(i);
  const F v_before = moments.ReadSecond(i);

  const F m = Vec::MulAdd(momentum, c.beta1, Vec::Mul(g, c.ombeta1));
  const F v = kDenominator == Denominator::kMax ? Vec::Max(v_before, Vec::Abs(g))
                                                : Vec::MulAdd(Vec::Mul(g, c.ombeta2), g, v_before);
  const F root = RootOf<kDenominator>(v);
  if constexpr (kWritesMoments<M, kPass>) moments.Write(i, m, v);
  if constexpr (kStatistics || kPass != Pass::kPlain) {
    sums.param_sq = Vec::MulAdd(p, p, sums.param_sq);
  }
  if constexpr (kStatistics) {
    const F zero = Vec::Set(0.0f);
    const F noise = Vec::MulSub(m, c.inv_bias_correction1, g);
    sums.grad_sq = Vec::MulAdd(g, g, sums.grad_sq);
    sums.m_sq = Vec::MulAdd(m, m, sums.m_sq);
    sums.m_hat_minus_grad_sq = Vec::MulAdd(noise, noise, sums.m_hat_minus_grad_sq);
    sums.grad_dot_param = Vec::MulAdd(g, p, sums.grad_dot_param);
    sums.grad_dot_momentum = Vec::MulAdd(g, momentum, sums.grad_dot_momentum);
    sums.momentum_sq = Vec::MulAdd(momentum, momentum, sums.momentum_sq);
    sums.count_gt_epsilon =
        Vec::Count(sums.count_gt_epsilon, Vec::Less(c.denominator_threshold, root));
    sums.count_same_sign_momentum = Vec::Count(
        sums.count_same_sign_momentum, Vec::Same(Vec::Less(g, zero), Vec::Less(momentum, zero)));
  }
  return {g, p, m, root};
}

// The second: the parameters.
template <bool kStatistics, Pass kPass, class W>
LHOPT_INLINE void UpdateParam(const W& weights, int64_t i, const Fresh& fresh, const Broadcast& c,
                              LaneSums& sums) {
  const F u = UpdateOf(fresh.m, fresh.root, fresh.p, c);
  if constexpr (kPass != Pass::kMomentsOnly) {
    const F kept = weights.Write(i, NewParam(fresh.p, u, c));
    if constexpr (kPass == Pass::kWithNorms) {
      sums.new_param_sq = Vec::MulAdd(kept, kept, sums.new_param_sq);
    }
  }
  if constexpr (kStatistics || kPass != Pass::kPlain) {
    sums.update_sq = Vec::MulAdd(u, u, sums.update_sq);
  }
  if constexpr (kStatistics) {
    sums.grad_dot_update = Vec::MulAdd(fresh.g, u, sums.grad_dot_update);
    sums.log_abs_update.Add(Vec::Add(Vec::Abs(u), Vec::Set(1e-8f)));
  }
}

// Four stretches side by side: one stream alone waits for memory, and one sum for its additions.
template <class G>
double SumOfSquares(const void* grad, int64_t size, float scale) {
  constexpr int kStreams = 4;
  const G* const g = static_cast<const G*>(grad);
  const F scales = Vec::Set(scale);
  const int64_t stretch = size / (kStreams * Vec::kWidth) * Vec::kWidth;
  double total = 0.0;
  for (int64_t i = 0; i < stretch;) {
    F sums[kStreams] = {Vec::Set(0.0f), Vec::Set(0.0f), Vec::Set(0.0f), Vec::Set(0.0f)};
    const int64_t end = Smaller(i + kVectorsPerFlush * Vec::kWidth, stretch);
    for (; i < end; i += Vec::kWidth) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const F x = Vec::Mul(Load(g + stream * stretch + i), scales);
        sums[stream] = Vec::MulAdd(x, x, sums[stream]);
      }
    }
    total += Vec::Total(sums[0]) + Vec::Total(sums[1]) + Vec::Total(sums[2]) + Vec::Total(sums[3]);
  }
  int64_t i = kStreams * stretch;
  F rest = Vec::Set(0.0f);
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) {
    const F x = Vec::Mul(Load(g + i), scales);
    rest = Vec::MulAdd(x, x, rest);
  }
  total += Vec::Total(rest);
  for (; i < size; ++i) {
    const float x = ToFloat(g[i]) * scale;
    total += static_cast<double>(x * x);
  }
  return total;
}

template <class G>
LHOPT_INLINE bool AreFinite(const G* grad, int64_t size) {
  const F zero = Vec::Set(0.0f);
  F sum = zero;  // of what finite numbers leave as it is
  for (int64_t i = 0; i < size; i += Vec::kWidth) sum = Vec::MulAdd(Load(grad + i), zero, sum);
  return Vec::Packed(Vec::Less(sum, Vec::Set(1.0f))) == (1u << Vec::kWidth) - 1;
}

// Stretches whose lane sums are flushed. Returns where the kernel has to stop. The second half of a
// vector comes after the first half of the next one: the divisions of both together take as long as
// one's.
template <class G, Denominator kDenominator, bool kStatistics, Pass kPass, class W, class M>
LHOPT_INLINE int64_t UpdateStretch(const W& weights, const G* grad, M& moments, int64_t begin,
                                   int64_t end, const Broadcast& c, bool looks, LaneSums& sums) {
  Fresh last{};
  for (int64_t block = begin; block < end; block += kScaleBlock) {
    const int64_t block_end = Smaller(block + kScaleBlock, end);
    if (looks && !AreFinite(grad + block, block_end - block)) {
      end = block;
      break;
    }
    moments.BeginBlock(block);
    for (int64_t i = block; i < block_end; i += Vec::kWidth) {
      if constexpr (Vec::kWidth > 1) {
        weights.Prefetch(i);
        Prefetch(grad + i);
        moments.Prefetch(i);
      }
      const Fresh fresh =
          UpdateMoments<kDenominator, kStatistics, kPass>(weights, grad, moments, i, c, sums);
      if (i > begin) UpdateParam<kStatistics, kPass>(weights, i - Vec::kWidth, last, c, sums);
      last = fresh;
    }
    if constexpr (kWritesMoments<M, kPass>) moments.EndBlock();
  }
  if (end > begin) UpdateParam<kStatistics, kPass>(weights, end - Vec::kWidth, last, c, sums);
  return end;
}

template <class W, class G, class M, Denominator kDenominator, bool kStatistics, Pass kPass>
int64_t Update(const Slice& slice, const Coefficients& coefficients, Sums& sums, bool looks) {
  const Broadcast c(coefficients);
  const W weights(slice);
  const G* const grad = static_cast<const G*>(slice.grad);
  typename M::Scratch scratch;
  M moments(slice, coefficients.beta2, scratch);
  int64_t done = 0, end = 0;
  while (done == end && done < slice.size) {
    end = Smaller(done + kVectorsPerFlush * Vec::kWidth, slice.size);
    LaneSums lanes;
    done = UpdateStretch<G, kDenominator, kStatistics, kPass>(weights, grad, moments, done, end, c,
                                                              looks, lanes);
    AddNorms(lanes, sums);
    if constexpr (kStatistics) AddStatistics(lanes, sums);
  }
  if constexpr (kWritesMoments<M, kPass>) {
    if (done > 0) moments.Finish();
  }
  return done;
}

// The parameters' update alone, once the trust ratio is known; sums only `new_param_sq`.
template <class W, Denominator kDenominator>
void Apply(const Slice& slice, const Coefficients& coefficients, Sums& sums) {
  const Broadcast c(coefficients);
  const W weights(slice);
  NoScratch none;
  const FloatMoments moments(slice, 1.0f, none);
  for (int64_t i = 0; i < slice.size;) {
    LaneSums lanes;
    const int64_t end = Smaller(i + kVectorsPerFlush * Vec::kWidth, slice.size);
    for (; i < end; i += Vec::kWidth) {
      const F p = weights.Read(i);
      const F root = RootOf<kDenominator>(moments.ReadSecond(i));
      const F u = UpdateOf(moments.ReadFirst(i), root, p, c);
      const F kept = weights.Write(i, NewParam(p, u, c));
      lanes.new_param_sq = Vec::MulAdd(kept, kept, lanes.new_param_sq);
    }
    sums.new_param_sq += Vec::Total(lanes.new_param_sq);
  }
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
      packed |= Vec::Packed(Vec::Less(Vec::Mul(Load(g + i + j), scales), zero)) << j;
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

// ---- From how numbers are kept to float32 and back ----

template <class G>
void ReadGradients(const Slice& slice, float* to) {
  const G* const grad = static_cast<const G*>(slice.grad);
  for (int64_t i = 0; i < slice.size; i += Vec::kWidth) Store(to + i, Load(grad + i));
}

template <class W>
void ReadWeights(const Slice& slice, float* to) {
  const W weights(slice);
  for (int64_t i = 0; i < slice.size; i += Vec::kWidth) Store(to + i, weights.Read(i));
}

template <class W>
void WriteWeights(const float* from, const Slice& slice) {
  const W weights(slice);
  for (int64_t i = 0; i < slice.size; i += Vec::kWidth) weights.Write(i, Load(from + i));
}

// The noise in plain arithmetic, which the compiler turns into vectors.
template <class P>
void WriteRandomly(const float* from, const RandomKeys& keys, uint32_t element,
                   const Slice& slice) {
  constexpr int64_t kBlock = 256;
  const WholeWeights<P> weights(slice);
  for (int64_t begin = 0; begin < slice.size; begin += kBlock) {
    const int64_t count = Smaller(kBlock, slice.size - begin);
    const uint32_t first = element + static_cast<uint32_t>(begin);
    float rounded[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = RandomWord(keys, first + static_cast<uint32_t>(i));
      rounded[i] = Neighbour(from[begin + i], word, P{});
    }
    for (int64_t i = 0; i < count; i += Vec::kWidth) weights.Write(begin + i, Load(rounded + i));
  }
}

template <class M>
void ReadMoments(const Slice& slice, float* exp_avg, float* exp_avg_sq) {
  typename M::Scratch scratch;
  M moments(slice, 1.0f, scratch);
  for (int64_t block = 0; block < slice.size; block += kScaleBlock) {
    moments.BeginBlock(block);
    for (int64_t i = block; i < Smaller(block + kScaleBlock, slice.size); i += Vec::kWidth) {
      Store(exp_avg + i, moments.ReadFirst(i));
      Store(exp_avg_sq + i, moments.ReadSecond(i));
    }
  }
}

template <class M>
void WriteMoments(const float* exp_avg, const float* exp_avg_sq, const Slice& slice) {
  typename M::Scratch scratch;
  M moments(slice, 1.0f, scratch);
  for (int64_t block = 0; block < slice.size; block += kScaleBlock) {
    moments.BeginBlock(block);
    for (int64_t i = block; i < Smaller(block + kScaleBlock, slice.size); i += Vec::kWidth) {
      moments.Write(i, Load(exp_avg + i), Load(exp_avg_sq + i));
    }
    moments.EndBlock();
  }
  moments.Finish();
}

// The tables below spell out what the driver indexes; see kernels.h for the axes.

#define LHOPT_UPDATE_STATISTICS(W, G, M, D, S)                                   \
  {Update<W, G, M, D, S, Pass::kPlain>, Update<W, G, M, D, S, Pass::kWithNorms>, \
   Update<W, G, M, D, S, Pass::kMomentsOnly>}
#define LHOPT_UPDATE_DENOMINATOR(W, G, M, D) \
  {LHOPT_UPDATE_STATISTICS(W, G, M, D, false), LHOPT_UPDATE_STATISTICS(W, G, M, D, true)}
#define LHOPT_UPDATE_MOMENTS(W, G, M)                    \
  {LHOPT_UPDATE_DENOMINATOR(W, G, M, Denominator::kRms), \
   LHOPT_UPDATE_DENOMINATOR(W, G, M, Denominator::kMax)}
#define LHOPT_UPDATE(W, G)                                                                \
  {LHOPT_UPDATE_MOMENTS(W, G, FloatMoments), LHOPT_UPDATE_MOMENTS(W, G, BFloat16Moments), \
   LHOPT_UPDATE_MOMENTS(W, G, CodedMoments)}
#define LHOPT_APPLY(W) {Apply<W, Denominator::kRms>, Apply<W, Denominator::kMax>}
#define LHOPT_FOR_WEIGHTS(OF)                                                      \
  {OF<WholeWeights<float>>, OF<WholeWeights<BFloat16>>, OF<WholeWeights<Float16>>, \
   OF<SplitWeights<int8_t>>, OF<SplitWeights<int16_t>>}

#define LHOPT_DEFINE_KERNELS(variable, isa)                                                     \
  const Kernels variable = {                                                                    \
      isa,                                                                                      \
      Vec::kWidth,                                                                              \
      {{LHOPT_UPDATE(WholeWeights<float>, float), LHOPT_UPDATE(WholeWeights<float>, BFloat16)}, \
       {{}, LHOPT_UPDATE(WholeWeights<BFloat16>, BFloat16)},                                    \
       {{}, {}, {LHOPT_UPDATE_MOMENTS(WholeWeights<Float16>, Float16, FloatMoments)}},          \
       {{}, LHOPT_UPDATE(SplitWeights<int8_t>, BFloat16)},                                      \
       {{}, LHOPT_UPDATE(SplitWeights<int16_t>, BFloat16)}},                                    \
      {LHOPT_APPLY(WholeWeights<float>), LHOPT_APPLY(WholeWeights<BFloat16>),                   \
       LHOPT_APPLY(WholeWeights<Float16>), LHOPT_APPLY(SplitWeights<int8_t>),                   \
       LHOPT_APPLY(SplitWeights<int16_t>)},                                                     \
      {SumOfSquares<float>, SumOfSquares<BFloat16>, SumOfSquares<Float16>},                     \
      {PackSigns<float>, PackSigns<BFloat16>, PackSigns<Float16>},                              \
      {ReadGradients<float>, ReadGradients<BFloat16>, ReadGradients<Float16>},                  \
      LHOPT_FOR_WEIGHTS(ReadWeights),                                                           \
      LHOPT_FOR_WEIGHTS(WriteWeights),                                                          \
      {WriteRandomly<float>, WriteRandomly<BFloat16>, WriteRandomly<Float16>},                  \
      {ReadMoments<FloatMoments>, ReadMoments<BFloat16Moments>, ReadMoments<CodedMoments>},     \
      {WriteMoments<FloatMoments>, WriteMoments<BFloat16Moments>, WriteMoments<CodedMoments>}}

}  // namespace
}  // namespace lhopt
