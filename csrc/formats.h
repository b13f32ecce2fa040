// Numbers as they are kept between steps, over the vector that the including unit chose: the twin
// of kernels/formats.py, which is the definition.
//
// Weights and moments are classes over a slice that the step's template takes for parameters. All
// of an element's numbers are read before any of them is written.
#pragma once

#include "vec.h"

namespace lhopt {
namespace {

using F = Vec::F;
using I = Vec::I;

// A call that takes sums or numbers by reference keeps them in memory; within an inlined one they
// stay in registers.
#define LHOPT_INLINE __attribute__((always_inline)) inline

// Lane sums are float32 for this many vectors and then flushed to float64: it bounds their error.
constexpr int64_t kVectorsPerFlush = 128;

constexpr int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Floats ----

template <class T>
LHOPT_INLINE F Load(const T* x) {
  return Vec::Load(x);
}

LHOPT_INLINE F Load(const BFloat16* x) {
  return Vec::FromBits(Vec::ShiftLeft<16>(Vec::LoadInts(&x->bits)));
}

// To the nearest number of T, which is returned.
template <class T>
LHOPT_INLINE F Store(T* out, F x) {
  return Vec::Store(out, x);
}

LHOPT_INLINE F Store(BFloat16* out, F x) {
  const I bits = Vec::BitsOf(Vec::Canonical(x));
  const I odd = Vec::And(Vec::ShiftRight<16>(bits), Vec::SetInts(1));
  const I rounded = Vec::ShiftRight<16>(Vec::Add(bits, Vec::Add(odd, Vec::SetInts(0x7fff))));
  Vec::StoreInts(&out->bits, rounded);
  return Vec::FromBits(Vec::ShiftLeft<16>(rounded));
}

// Asks for what comes this many bytes after a vector of x: less than the processor's own look
// ahead, but across the borders of pages, and while the arithmetic keeps it busy.
template <class T>
LHOPT_INLINE void Prefetch(const T* x) {
  constexpr int64_t kAhead = 512, kLine = 64;
  const char* const ahead = reinterpret_cast<const char*>(x) + kAhead;
  for (int64_t byte = 0; byte < Vec::kWidth * int64_t{sizeof(T)}; byte += kLine) {
    __builtin_prefetch(ahead + byte);
  }
}

// ---- Weights ----

template <class P>
class WholeWeights {
 public:
  explicit WholeWeights(const Slice& slice) : param_(static_cast<P*>(slice.param)) {}

  LHOPT_INLINE void Prefetch(int64_t i) const { lhopt::Prefetch(param_ + i); }
  LHOPT_INLINE F Read(int64_t i) const { return Load(param_ + i); }
  // Returns what is kept.
  LHOPT_INLINE F Write(int64_t i, F x) const { return Store(param_ + i, x); }

 private:
  P* const param_;
};

// Bfloat16 parameters and C, what they lack of their masters, which are what is stepped.
template <class C>
class SplitWeights {
 public:
  explicit SplitWeights(const Slice& slice)
      : param_(static_cast<uint16_t*>(slice.param)),
        corrections_(static_cast<C*>(slice.corrections)) {}

  LHOPT_INLINE void Prefetch(int64_t i) const {
    lhopt::Prefetch(param_ + i);
    lhopt::Prefetch(corrections_ + i);
  }

  LHOPT_INLINE F Read(int64_t i) const {
    const I upper = Vec::ShiftLeft<16>(Vec::LoadInts(param_ + i));
    const I lacks = Vec::LoadInts(corrections_ + i);
    const I joined = Vec::Add(upper, kIsHalf ? Vec::ShiftLeft<8>(lacks) : lacks);
    const I changes = Vec::Xor(joined, upper);  // none where they would change the sign
    return Vec::FromBits(Vec::Xor(joined, Vec::And(changes, Vec::ShiftRightSigned<31>(changes))));
  }

  // Returns the master, whatever is kept of it.
  LHOPT_INLINE F Write(int64_t i, F master) const {
    const I bits = Vec::BitsOf(Vec::Canonical(master));
    const I upper = Vec::ShiftRight<16>(Vec::Add(bits, Vec::SetInts(0x8000)));
    const I lacks = Vec::Sub(bits, Vec::ShiftLeft<16>(upper));
    const I rounded = Vec::ShiftRightSigned<8>(Vec::Add(lacks, Vec::SetInts(0x80)));
    Vec::StoreInts(param_ + i, upper);
    Vec::StoreInts(corrections_ + i, kIsHalf ? Vec::Min(rounded, Vec::SetInts(127)) : lacks);
    return master;
  }

 private:
  static constexpr bool kIsHalf = sizeof(C) == 1;

  uint16_t* const param_;
  C* const corrections_;
};

// ---- Moments ----
//
// They are read and written by vectors, in blocks of kScaleBlock that begin and end, and the last
// of them have reached memory when all is finished. v is read decayed already: multiplied by beta2.

struct NoScratch {};

// What is a number each.
template <class T>
class NumberMoments {
 public:
  using Scratch = NoScratch;

  NumberMoments(const Slice& slice, float beta2)
      : m_(static_cast<T*>(slice.exp_avg)),
        v_(static_cast<T*>(slice.exp_avg_sq)),
        beta2_(Vec::Set(beta2)) {}

  LHOPT_INLINE void Prefetch(int64_t i) const {
    lhopt::Prefetch(m_ + i);
    lhopt::Prefetch(v_ + i);
  }
  LHOPT_INLINE void BeginBlock(int64_t) const {}
  LHOPT_INLINE F ReadFirst(int64_t i) const { return Load(m_ + i); }
  LHOPT_INLINE F ReadSecond(int64_t i) const { return Vec::Mul(Load(v_ + i), beta2_); }
  LHOPT_INLINE void EndBlock() const {}
  LHOPT_INLINE void Finish() const {}

 protected:
  T* const m_;
  T* const v_;

 private:
  const F beta2_;
};

class FloatMoments : public NumberMoments<float> {
 public:
  static constexpr bool kIsExact = true;  // what is read again is what was written

  FloatMoments(const Slice& slice, float beta2, Scratch&) : NumberMoments(slice, beta2) {}

  LHOPT_INLINE void Write(int64_t i, F m, F v) const {
    Store(m_ + i, m);
    Store(v_ + i, v);
  }
};

class BFloat16Moments : public NumberMoments<BFloat16> {
 public:
  static constexpr bool kIsExact = false;

  BFloat16Moments(const Slice& slice, float beta2, Scratch&)
      : NumberMoments(slice, beta2), words_(slice.dither->words), place_(slice.place) {}

  LHOPT_INLINE void Write(int64_t i, F m, F v) const {
    const F largest = Vec::Set(0x1.fep127f), smallest = Vec::Set(-0x1.fep127f);
    const I words = Vec::LoadInts(words_ + (place_ + i) % kScaleBlock);
    StoreDithered(m_ + i, Vec::Max(Vec::Min(m, largest), smallest), words);
    StoreDithered(v_ + i, Vec::Min(v, largest), words);
  }

 private:
  LHOPT_INLINE static void StoreDithered(BFloat16* out, F x, I words) {
    Vec::StoreInts(&out->bits, Vec::ShiftRight<16>(Vec::Add(Vec::BitsOf(x), words)));
  }

  const uint32_t* const words_;
  const int64_t place_;
};

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

// Codes of 8 bits. The scale of a block is known when its last vector is: till then fresh numbers
// wait in the innermost cache. Each block is encoded after the next one has been stepped, whose
// arithmetic hides that of the scale.
class CodedMoments {
 public:
  static constexpr bool kIsExact = false;
  static constexpr int64_t kBlock = kScaleBlock, kWaiting = 2 * kBlock;

  struct Scratch {
    alignas(64) float m[kWaiting];
    alignas(64) float roots[kWaiting];  // of v
  };

  CodedMoments(const Slice& slice, float beta2, Scratch& fresh)
      : m_(static_cast<int8_t*>(slice.exp_avg)),
        v_(static_cast<uint8_t*>(slice.exp_avg_sq)),
        m_scales_(slice.exp_avg_scale),
        v_scales_(slice.exp_avg_sq_scale),
        shares_(slice.dither->shares),
        beta2_(beta2),
        fresh_(fresh) {
    m_scale_ = root_unit_ = m_largest_ = v_largest_ = m_unit_ = per_root_ = Vec::Set(0.0f);
  }

  LHOPT_INLINE void Prefetch(int64_t i) const {
    lhopt::Prefetch(m_ + i);
    lhopt::Prefetch(v_ + i);
  }

  LHOPT_INLINE void BeginBlock(int64_t i) {
    block_ = i;
    const float v_scale = ToFloat(BFloat16{v_scales_[i / kBlock]});
    m_scale_ = Vec::Set(ToFloat(BFloat16{m_scales_[i / kBlock]}));
    root_unit_ = Vec::Set(__builtin_sqrtf(beta2_ * v_scale) * (1.0f / 255.0f));
    m_largest_ = v_largest_ = Vec::Set(0.0f);
  }

  LHOPT_INLINE F ReadFirst(int64_t i) const {
    const F code = Vec::ToFloats(Vec::LoadInts(m_ + i));
    return Vec::Div(Vec::Mul(m_scale_, code), Vec::Sub(Vec::Set(254.0f), Vec::Abs(code)));
  }

  LHOPT_INLINE F ReadSecond(int64_t i) const {
    const F root = Vec::Mul(Vec::ToFloats(Vec::LoadInts(v_ + i)), root_unit_);
    return Vec::Mul(root, root);
  }

  LHOPT_INLINE void Write(int64_t i, F m, F v) {
    Store(fresh_.m + (i & (kWaiting - 1)), m);
    Store(fresh_.roots + (i & (kWaiting - 1)), Vec::Sqrt(v));
    m_largest_ = Vec::Max(m_largest_, Vec::Abs(m));
    v_largest_ = Vec::Max(v_largest_, v);
  }

  LHOPT_INLINE void EndBlock() {
    const uint16_t m_scale = ScaleOf(Vec::Largest(m_largest_));
    const uint16_t v_scale = ScaleOf(Vec::Largest(v_largest_));
    m_scales_[block_ / kBlock] = m_scale;
    v_scales_[block_ / kBlock] = v_scale;
    if (block_ > 0) Encode(block_ - kBlock);
    m_unit_ = Vec::Set(DivisorOf(m_scale) * (1.0f / 254.0f));
    per_root_ = Vec::Set(255.0f / __builtin_sqrtf(DivisorOf(v_scale)));
  }

  LHOPT_INLINE void Finish() const { Encode(block_); }

 private:
  LHOPT_INLINE void Encode(int64_t block) const {
    const F unit = Vec::Set(1.0f / 254.0f), low = Vec::Set(-127.0f), high = Vec::Set(127.0f);
    for (int64_t i = block; i < block + kBlock; i += Vec::kWidth) {
      const F share = Load(shares_ + (i & (kBlock - 1))), m = Load(fresh_.m + (i & (kWaiting - 1)));
      const F whole = Vec::MulAdd(Vec::Abs(m), unit, m_unit_);
      const F m_code = Vec::Add(Vec::Div(m, whole), share);
      Vec::StoreInts(m_ + i, Vec::Floor(Vec::Max(Vec::Min(m_code, high), low)));
      const F v_code = Vec::MulAdd(Load(fresh_.roots + (i & (kWaiting - 1))), per_root_, share);
      Vec::StoreInts(v_ + i, Vec::Floor(Vec::Min(v_code, Vec::Set(255.0f))));
    }
  }

  int8_t* const m_;
  uint8_t* const v_;
  uint16_t* const m_scales_;
  uint16_t* const v_scales_;
  const float* const shares_;
  const float beta2_;
  Scratch& fresh_;
  int64_t block_ = 0;
  F m_scale_, root_unit_;    // of what is read
  F m_largest_, v_largest_;  // of what is written
  F m_unit_, per_root_;      // of what waits: scale / 254, 255 / sqrt(scale)
};

}  // namespace
}  // namespace lhopt
