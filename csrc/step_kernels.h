// The arithmetic of the step, once, over the vector that the including unit chose.
#pragma once

#include "vec.h"

namespace lhopt {
namespace {

using F = Vec::F;

// Lane sums are float32 for this many vectors and then flushed to float64: it bounds their error.
constexpr int64_t kVectorsPerFlush = 128;

// A call that takes the lane sums by reference keeps them in memory; within an inlined one they
// stay in registers.
#define LHOPT_INLINE __attribute__((always_inline)) inline

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
        denominator_scale(Vec::Set(c.denominator_scale)),
        denominator_offset(Vec::Set(c.denominator_offset)),
        denominator_threshold(Vec::Set(c.denominator_threshold)),
        weight_decay(Vec::Set(c.weight_decay)),
        decay_factor(Vec::Set(c.decay_factor)),
        step_size(Vec::Set(c.step_size)) {}

  F grad_scale, beta1, ombeta1, beta2, ombeta2, inv_bias_correction1;
  F denominator_scale, denominator_offset, denominator_threshold;
  F weight_decay, decay_factor, step_size;
};

// Sum of log x over x >= 1e-8 as the log of products whose exponents are taken out and added up.
// The product of two x overflows only where x^2 does too.
class LogSum {
 public:
  LogSum() : product_(Vec::Set(1.0f)), exponent_(Vec::Zero()) {}

  LHOPT_INLINE void Add(F x) { product_ = Vec::Mul(product_, x); }

  // To be called after every second Add.
  LHOPT_INLINE void TakeExponent() { product_ = Vec::TakeExponent(product_, exponent_); }

  // One logarithm for all lanes, after `calls` of TakeExponent.
  LHOPT_INLINE double Total(int64_t calls) const {
    constexpr int64_t kBias = 126;
    float lanes[Vec::kWidth];
    Vec::Store(lanes, product_);
    double product = 1.0;  // of up to 16 lanes, each at least 1/2
    for (int64_t lane = 0; lane < Vec::kWidth; ++lane) product *= lanes[lane];
    const int64_t exponent = Vec::Total(exponent_) - kBias * calls * Vec::kWidth;
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
    m_sq = m_hat_minus_grad_sq = Vec::Set(0.0f);
    grad_dot_param = grad_dot_update = Vec::Set(0.0f);
    grad_dot_momentum = momentum_sq = Vec::Set(0.0f);
  }

  F param_sq, update_sq, new_param_sq;
  F m_sq, m_hat_minus_grad_sq;
  F grad_dot_param, grad_dot_update;
  F grad_dot_momentum, momentum_sq;
  LogSum log_abs_update;
  Vec::I count_gt_epsilon, count_same_sign_momentum;

  LHOPT_INLINE void AddNorms(Sums& sums) const {
    sums.param_sq += Vec::Total(param_sq);
    sums.update_sq += Vec::Total(update_sq);
    sums.new_param_sq += Vec::Total(new_param_sq);
  }

  LHOPT_INLINE void AddStatistics(int64_t exponents_taken, Sums& sums) const {
    const double update_sq_total = Vec::Total(update_sq);
    sums.m_sq += Vec::Total(m_sq);
    sums.m_hat_minus_grad_sq += Vec::Total(m_hat_minus_grad_sq);
    sums.grad_dot_param += Vec::Total(grad_dot_param);
    sums.grad_dot_update += Vec::Total(grad_dot_update);
    sums.grad_dot_momentum += Vec::Total(grad_dot_momentum);
    sums.momentum_sq += Vec::Total(momentum_sq);
    // Exponent bits know no NaN or inf; the squares of the same numbers do.
    sums.sum_log_abs_update +=
        isfinite(update_sq_total) ? log_abs_update.Total(exponents_taken) : update_sq_total;
    sums.count_gt_epsilon += static_cast<double>(Vec::Total(count_gt_epsilon));
    sums.count_same_sign_momentum += static_cast<double>(Vec::Total(count_same_sign_momentum));
  }
};

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

// p <- a p - lr T u, as stored
template <class P>
LHOPT_INLINE F StoreParam(P* out, F p, F u, const Broadcast& c) {
  return Vec::Store(out, Vec::NegMulAdd(c.step_size, u, Vec::Mul(p, c.decay_factor)));
}

// Asks for what comes this many bytes after x..x + 2 vectors: less than the processor's own look
// ahead, but across the borders of pages, and while the arithmetic keeps it busy.
template <class T>
LHOPT_INLINE void Prefetch(const T* x) {
  constexpr int64_t kAhead = 512, kLine = 64;
  const char* const ahead = reinterpret_cast<const char*>(x) + kAhead;
  for (int64_t byte = 0; byte < 2 * Vec::kWidth * int64_t{sizeof(T)}; byte += kLine) {
    __builtin_prefetch(ahead + byte);
  }
}

template <class P, class G>
LHOPT_INLINE void PrefetchStreams(const Slice& slice, int64_t i) {
  Prefetch(static_cast<const P*>(slice.param) + i);
  Prefetch(static_cast<const G*>(slice.grad) + i);
  Prefetch(slice.exp_avg + i);
  Prefetch(slice.exp_avg_sq + i);
}

// One vector of the step.
template <class P, class G, Denominator kDenominator, bool kStatistics, Pass kPass>
LHOPT_INLINE void UpdateVector(const Slice& slice, int64_t i, const Broadcast& c, LaneSums& sums) {
  P* const param = static_cast<P*>(slice.param) + i;
  const F g = Vec::Mul(Vec::Load(static_cast<const G*>(slice.grad) + i), c.grad_scale);
  const F p = Vec::Load(param);
  const F momentum = Vec::Load(slice.exp_avg + i);
  const F v_before = Vec::Mul(Vec::Load(slice.exp_avg_sq + i), c.beta2);

  const F m = Vec::MulAdd(momentum, c.beta1, Vec::Mul(g, c.ombeta1));
  const F v = kDenominator == Denominator::kMax ? Vec::Max(v_before, Vec::Abs(g))
                                                : Vec::MulAdd(Vec::Mul(g, c.ombeta2), g, v_before);
  const F root = RootOf<kDenominator>(v);
  const F u = UpdateOf(m, root, p, c);
  Vec::Store(slice.exp_avg + i, m);
  Vec::Store(slice.exp_avg_sq + i, v);
  if constexpr (kPass != Pass::kMomentsOnly) {
    const F stored = StoreParam(param, p, u, c);
    if constexpr (kPass == Pass::kWithNorms) {
      sums.new_param_sq = Vec::MulAdd(stored, stored, sums.new_param_sq);
    }
  }
  if constexpr (kStatistics || kPass != Pass::kPlain) {
    sums.param_sq = Vec::MulAdd(p, p, sums.param_sq);
    sums.update_sq = Vec::MulAdd(u, u, sums.update_sq);
  }
  if constexpr (kStatistics) {
    const F zero = Vec::Set(0.0f);
    const F noise = Vec::MulSub(m, c.inv_bias_correction1, g);
    sums.m_sq = Vec::MulAdd(m, m, sums.m_sq);
    sums.m_hat_minus_grad_sq = Vec::MulAdd(noise, noise, sums.m_hat_minus_grad_sq);
    sums.grad_dot_param = Vec::MulAdd(g, p, sums.grad_dot_param);
    sums.grad_dot_update = Vec::MulAdd(g, u, sums.grad_dot_update);
    sums.grad_dot_momentum = Vec::MulAdd(g, momentum, sums.grad_dot_momentum);
    sums.momentum_sq = Vec::MulAdd(momentum, momentum, sums.momentum_sq);
    sums.log_abs_update.Add(Vec::Add(Vec::Abs(u), Vec::Set(1e-8f)));
    sums.count_gt_epsilon =
        Vec::Count(sums.count_gt_epsilon, Vec::Less(c.denominator_threshold, root));
    sums.count_same_sign_momentum = Vec::Count(
        sums.count_same_sign_momentum, Vec::Same(Vec::Less(g, zero), Vec::Less(momentum, zero)));
  }
}

template <class P, class G, Denominator kDenominator, bool kStatistics, Pass kPass>
void Update(const Slice& slice, const Coefficients& coefficients, Sums& sums) {
  const Broadcast c(coefficients);
  for (int64_t i = 0; i < slice.size;) {
    LaneSums lanes;
    const int64_t end = Smaller(i + kVectorsPerFlush * Vec::kWidth, slice.size);
    const int64_t vectors = (end - i) / Vec::kWidth;
    for (int64_t pairs = vectors / 2; pairs > 0; --pairs, i += 2 * Vec::kWidth) {
      if constexpr (Vec::kWidth > 1) PrefetchStreams<P, G>(slice, i);
      UpdateVector<P, G, kDenominator, kStatistics, kPass>(slice, i, c, lanes);
      UpdateVector<P, G, kDenominator, kStatistics, kPass>(slice, i + Vec::kWidth, c, lanes);
      lanes.log_abs_update.TakeExponent();
    }
    if (vectors % 2 != 0) {
      UpdateVector<P, G, kDenominator, kStatistics, kPass>(slice, i, c, lanes);
      lanes.log_abs_update.TakeExponent();
      i += Vec::kWidth;
    }
    lanes.AddNorms(sums);
    if constexpr (kStatistics) lanes.AddStatistics((vectors + 1) / 2, sums);
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
      const F root = RootOf<kDenominator>(Vec::Load(slice.exp_avg_sq + i));
      const F stored = StoreParam(param, p, UpdateOf(Vec::Load(slice.exp_avg + i), root, p, c), c);
      lanes.new_param_sq = Vec::MulAdd(stored, stored, lanes.new_param_sq);
    }
    sums.new_param_sq += Vec::Total(lanes.new_param_sq);
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
        const F x = Vec::Mul(Vec::Load(g + stream * stretch + i), scales);
        sums[stream] = Vec::MulAdd(x, x, sums[stream]);
      }
    }
    total += Vec::Total(sums[0]) + Vec::Total(sums[1]) + Vec::Total(sums[2]) + Vec::Total(sums[3]);
  }
  int64_t i = kStreams * stretch;
  F rest = Vec::Set(0.0f);
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) {
    const F x = Vec::Mul(Vec::Load(g + i), scales);
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

template <class P>
void Widen(const void* from, int64_t size, float* to) {
  const P* const x = static_cast<const P*>(from);
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) Vec::Store(to + i, Vec::Load(x + i));
  for (; i < size; ++i) to[i] = ToFloat(x[i]);
}

template <class P>
void Narrow(const float* from, int64_t size, void* to) {
  P* const x = static_cast<P*>(to);
  int64_t i = 0;
  for (; i + Vec::kWidth <= size; i += Vec::kWidth) Vec::Store(x + i, Vec::Load(from + i));
  for (; i < size; ++i) FromFloat(from[i], x + i);
}

// In plain arithmetic, which the compiler turns into vectors.
template <class P>
double NarrowRandomly(const float* from, int64_t size, const RandomKeys& keys, uint32_t element,
                      void* to) {
  constexpr int64_t kBlock = 256;
  P* const out = static_cast<P*>(to);
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t count = Smaller(kBlock, size - begin);
    const uint32_t first = element + static_cast<uint32_t>(begin);
    float rounded[kBlock];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t word = RandomWord(keys, first + static_cast<uint32_t>(i));
      rounded[i] = Neighbour(from[begin + i], word, P{});
    }
    Narrow<P>(rounded, count, out + begin);
    total += SumOfSquares<P>(out + begin, count, 1.0f);
  }
  return total;
}

// ---- Stored moments and split masters; kernels/formats.py defines them ----

void DecodeCodes(const Codes& from, int64_t size, float* exp_avg, float* exp_avg_sq) {
  const F range = Vec::Set(254.0f), inv_range = Vec::Set(1.0f / 255.0f);
  for (int64_t begin = 0; begin < size; begin += kScaleBlock) {
    const int64_t block = begin / kScaleBlock;
    const F scale = Vec::Set(ToFloat(BFloat16{from.exp_avg_scale[block]}));
    const F sq_scale = Vec::Set(ToFloat(BFloat16{from.exp_avg_sq_scale[block]}));
    for (int64_t i = begin; i < begin + kScaleBlock; i += Vec::kWidth) {
      const F code = Vec::Load(from.exp_avg + i);
      const F share = Vec::Mul(code, Vec::Reciprocal(Vec::Sub(range, Vec::Abs(code))));
      Vec::Store(exp_avg + i, Vec::Mul(scale, share));
      const F root = Vec::Mul(Vec::Load(from.exp_avg_sq + i), inv_range);
      Vec::Store(exp_avg_sq + i, Vec::Mul(sq_scale, Vec::Mul(root, root)));
    }
  }
}

// Of a block's largest magnitude: the bits of the bfloat16 above it.
LHOPT_INLINE uint16_t ScaleOf(float largest) {
  constexpr uint32_t kSlack = 15, kLargest = 0x7f7f;
  const uint32_t up = (BitsOf(largest) + 0xffffu - kSlack) >> 16;
  return static_cast<uint16_t>(up < kLargest ? up : kLargest);
}

// A scale as a divisor, so large that 254 over it is finite.
LHOPT_INLINE float DivisorOf(uint16_t scale) {
  constexpr float kTiny = 0x1p-117f;
  const float x = ToFloat(BFloat16{scale});
  return x > kTiny ? x : kTiny;
}

// sqrt(x) for x >= 0, to about a unit in the last place; 0 below the normal numbers.
LHOPT_INLINE F NearRoot(F x) {
  const F inverse = Vec::RootReciprocal(Vec::Max(x, Vec::Set(0x1p-126f)));
  const F root = Vec::Mul(x, inverse);
  const F error = Vec::NegMulAdd(root, root, x);
  return Vec::MulAdd(Vec::Mul(inverse, Vec::Set(0.5f)), error, root);
}

// The scales of some blocks, and what their numbers are multiplied by. (Many at a time: one after
// the other, each would wait for its own divisions.)
LHOPT_INLINE void ScaleBlocks(const float* m, const float* v, int64_t blocks, uint16_t* m_scales,
                              uint16_t* v_scales, float* m_factors, float* v_factors) {
  for (int64_t block = 0; block < blocks; ++block) {
    F m_largest = Vec::Set(0.0f), v_largest = Vec::Set(0.0f);
    for (int64_t i = block * kScaleBlock; i < (block + 1) * kScaleBlock; i += Vec::kWidth) {
      m_largest = Vec::Max(m_largest, Vec::Abs(Vec::Load(m + i)));
      v_largest = Vec::Max(v_largest, Vec::Load(v + i));
    }
    m_factors[block] = Vec::Largest(m_largest);
    v_factors[block] = Vec::Largest(v_largest);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    m_scales[block] = ScaleOf(m_factors[block]);
    v_scales[block] = ScaleOf(v_factors[block]);
    m_factors[block] = 254.0f / DivisorOf(m_scales[block]);
    v_factors[block] = 255.0f / __builtin_sqrtf(DivisorOf(v_scales[block]));
  }
}

void EncodeCodes(const float* exp_avg, const float* exp_avg_sq, int64_t size, const Dither& dither,
                 const Codes& to) {
  constexpr int64_t kBlocks = 16;  // at a time
  const F one = Vec::Set(1.0f), unit = Vec::Set(1.0f / 254.0f);
  const F low = Vec::Set(-127.0f), high = Vec::Set(127.0f), sq_high = Vec::Set(255.0f);
  for (int64_t first = 0; first < size / kScaleBlock; first += kBlocks) {
    const int64_t blocks = Smaller(kBlocks, size / kScaleBlock - first);
    float m_factors[kBlocks], v_factors[kBlocks];
    ScaleBlocks(exp_avg + first * kScaleBlock, exp_avg_sq + first * kScaleBlock, blocks,
                to.exp_avg_scale + first, to.exp_avg_sq_scale + first, m_factors, v_factors);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = (first + block) * kScaleBlock;
      const F m_factor = Vec::Set(m_factors[block]), v_factor = Vec::Set(v_factors[block]);
      for (int64_t i = 0; i < kScaleBlock; i += Vec::kWidth) {
        const F share = Vec::Load(dither.shares + i);
        const F x = Vec::Mul(Vec::Load(exp_avg + begin + i), m_factor);  // 254 times its share
        const F inverse = Vec::Reciprocal(Vec::MulAdd(Vec::Abs(x), unit, one));
        const F code = Vec::MulAdd(x, inverse, share);
        Vec::StoreFloor(to.exp_avg + begin + i, Vec::Max(Vec::Min(code, high), low));
        const F root = NearRoot(Vec::Load(exp_avg_sq + begin + i));
        const F sq_code = Vec::MulAdd(root, v_factor, share);
        Vec::StoreFloor(to.exp_avg_sq + begin + i, Vec::Min(sq_code, sq_high));
      }
    }
  }
}

// The rest in plain arithmetic, which the compiler turns into vectors.

void NarrowDithered(const float* __restrict from, int64_t size, const Dither& dither, void* to) {
  constexpr uint32_t kLargest = 0x7f7f0000u;
  uint16_t* const __restrict out = static_cast<uint16_t*>(to);
  for (int64_t begin = 0; begin < size; begin += kScaleBlock) {
    const int64_t count = Smaller(kScaleBlock, size - begin);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = BitsOf(from[begin + i]), magnitude = bits & 0x7fffffffu;
      const uint32_t kept = (bits & 0x80000000u) | (magnitude < kLargest ? magnitude : kLargest);
      out[begin + i] = static_cast<uint16_t>((kept + dither.words[i]) >> 16);
    }
  }
}

// C: of the correction, of whose bits the lowest is worth 2^kShift of a float32's.
template <class C>
void JoinMaster(const void* param, const void* correction, int64_t size, float* __restrict master) {
  constexpr int kShift = sizeof(C) == 1 ? 8 : 0;
  const uint16_t* const p = static_cast<const uint16_t*>(param);
  const C* const c = static_cast<const C*>(correction);
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = uint32_t{p[i]} << 16;
    const uint32_t joined = bits + (static_cast<uint32_t>(int32_t{c[i]}) << kShift);
    master[i] = FloatFromBits((joined ^ bits) & 0x80000000u ? bits : joined);
  }
}

template <class C>
void SplitMaster(const float* __restrict master, int64_t size, void* param, void* correction) {
  constexpr int kShift = sizeof(C) == 1 ? 8 : 0;
  constexpr int32_t kRound = (1 << kShift) >> 1, kLargest = (1 << (15 - kShift)) - 1;
  uint16_t* const __restrict p = static_cast<uint16_t*>(param);
  C* const __restrict c = static_cast<C*>(correction);
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = BitsOf(master[i]);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t upper = (bits + 0x8000u) & 0xffff0000u;
    const int32_t lacks = (static_cast<int32_t>(bits - upper) + kRound) >> kShift;
    const int32_t held = lacks < kLargest ? lacks : kLargest;
    p[i] = static_cast<uint16_t>((is_nan ? 0x7fc00000u : upper) >> 16);
    c[i] = static_cast<C>(is_nan ? 0 : held);
  }
}

// The tables below spell out what the driver indexes; see kernels.h for the axes.

#define LHOPT_UPDATE_STATISTICS(P, G, D, S)                                \
  {Update<P, G, D, S, Pass::kPlain>, Update<P, G, D, S, Pass::kWithNorms>, \
   Update<P, G, D, S, Pass::kMomentsOnly>}
#define LHOPT_UPDATE_DENOMINATOR(P, G, D) \
  {LHOPT_UPDATE_STATISTICS(P, G, D, false), LHOPT_UPDATE_STATISTICS(P, G, D, true)}
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
      {PackSigns<float>, PackSigns<BFloat16>, PackSigns<Float16>},                            \
      {Widen<float>, Widen<BFloat16>, Widen<Float16>},                                        \
      {Narrow<float>, Narrow<BFloat16>, Narrow<Float16>},                                     \
      {NarrowRandomly<float>, NarrowRandomly<BFloat16>, NarrowRandomly<Float16>},             \
      DecodeCodes,                                                                            \
      EncodeCodes,                                                                            \
      NarrowDithered,                                                                         \
      {nullptr, JoinMaster<int8_t>, JoinMaster<int16_t>},                                     \
      {nullptr, SplitMaster<int8_t>, SplitMaster<int16_t>}}

}  // namespace
}  // namespace lhopt
