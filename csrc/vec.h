// A thin vector of floats per instruction set, all with the same static interface.
//
// A translation unit defines one LHOPT_VEC_* macro and sets its compilation target before including
// this file; the wrapper `Vec` then lives in that unit alone. F holds kWidth floats, I as many
// 32-bit integers, M one truth value per lane.
#pragma once

#include "half.h"

namespace lhopt {
namespace {

#if defined(LHOPT_VEC_AVX512)

struct Vec {
  static constexpr int64_t kWidth = 16;
  using F = __m512;
  using I = __m512i;
  using M = uint32_t;  // a bit for each lane

  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* x) { return _mm512_loadu_ps(x); }
  static F Load(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  static F Store(float* out, F x) {
    _mm512_storeu_ps(out, x);
    return x;
  }
  static F Store(Float16* out, F x) {
    const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
    return _mm512_cvtph_ps(half);
  }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F MulAdd(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }      // a b + c
  static F MulSub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }      // a b - c
  static F NegMulAdd(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static F Sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }  // b where a is NaN
  static float Largest(F a) { return _mm512_reduce_max_ps(a); }
  static F Abs(F a) { return _mm512_abs_ps(a); }
  // x, or the one NaN in place of any.
  static F Canonical(F x) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")),
                              _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), x);
  }

  static I SetInts(int32_t x) { return _mm512_set1_epi32(x); }
  static I LoadInts(const uint32_t* x) { return _mm512_loadu_si512(x); }
  static I LoadInts(const int16_t* x) { return _mm512_cvtepi16_epi32(Half(x)); }
  static I LoadInts(const uint16_t* x) { return _mm512_cvtepu16_epi32(Half(x)); }
  static I LoadInts(const int8_t* x) { return _mm512_cvtepi8_epi32(Quarter(x)); }
  static I LoadInts(const uint8_t* x) { return _mm512_cvtepu8_epi32(Quarter(x)); }
  // Of integers within range.
  template <class T>
  static void StoreInts(T* out, I x) {
    if constexpr (sizeof(T) == 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(x));
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
    }
  }
  static F ToFloats(I x) { return _mm512_cvtepi32_ps(x); }
  static I Floor(F x) {
    return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  }
  static I BitsOf(F x) { return _mm512_castps_si512(x); }
  static F FromBits(I x) { return _mm512_castsi512_ps(x); }
  static I Add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I And(I a, I b) { return _mm512_and_si512(a, b); }
  static I Xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I Min(I a, I b) { return _mm512_min_epi32(a, b); }
  template <int kBits>
  static I ShiftLeft(I x) {
    return _mm512_slli_epi32(x, kBits);
  }
  template <int kBits>
  static I ShiftRight(I x) {  // zeros come in
    return _mm512_srli_epi32(x, kBits);
  }
  template <int kBits>
  static I ShiftRightSigned(I x) {
    return _mm512_srai_epi32(x, kBits);
  }

  static M Less(F a, F b) { return _cvtmask16_u32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }
  static M Same(M a, M b) { return a ^ b ^ 0xffffu; }
  static uint32_t Packed(M a) { return a; }
  // In registers of their own: those of vectors are busier.
  using Counter = int64_t;
  static Counter Count(Counter count, M a) { return count + __builtin_popcount(a); }
  static int64_t Total(Counter a) { return a; }

  static double Total(F a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
  static int64_t Total(I a) { return _mm512_reduce_add_epi32(a); }

 private:
  static __m256i Half(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
  static __m128i Quarter(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
};

#elif defined(LHOPT_VEC_AVX2)

struct Vec {
  static constexpr int64_t kWidth = 8;
  using F = __m256;
  using I = __m256i;
  using M = __m256;  // all bits of a lane

  static F Set(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* x) { return _mm256_loadu_ps(x); }
  static F Load(const Float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }

  static F Store(float* out, F x) {
    _mm256_storeu_ps(out, x);
    return x;
  }
  static F Store(Float16* out, F x) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half);
    return _mm256_cvtph_ps(half);
  }

  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F MulAdd(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F MulSub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F NegMulAdd(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F Sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static float Largest(F a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  static F Abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F Canonical(F x) {
    return _mm256_blendv_ps(_mm256_set1_ps(__builtin_nanf("")), x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
  }

  static I SetInts(int32_t x) { return _mm256_set1_epi32(x); }
  static I LoadInts(const uint32_t* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  }
  static I LoadInts(const int16_t* x) { return _mm256_cvtepi16_epi32(Half(x)); }
  static I LoadInts(const uint16_t* x) { return _mm256_cvtepu16_epi32(Half(x)); }
  static I LoadInts(const int8_t* x) { return _mm256_cvtepi8_epi32(Quarter(x)); }
  static I LoadInts(const uint8_t* x) { return _mm256_cvtepu8_epi32(Quarter(x)); }
  static void StoreInts(uint16_t* out, I x) {
    const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi32(low, high));
  }
  static void StoreInts(int16_t* out, I x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), PackedInt16(x));
  }
  static void StoreInts(int8_t* out, I x) {
    const __m128i packed = PackedInt16(x);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(packed, packed));
  }
  static void StoreInts(uint8_t* out, I x) {
    const __m128i packed = PackedInt16(x);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(packed, packed));
  }
  static F ToFloats(I x) { return _mm256_cvtepi32_ps(x); }
  static I Floor(F x) { return _mm256_cvtps_epi32(_mm256_floor_ps(x)); }
  static I BitsOf(F x) { return _mm256_castps_si256(x); }
  static F FromBits(I x) { return _mm256_castsi256_ps(x); }
  static I Add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I Sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I And(I a, I b) { return _mm256_and_si256(a, b); }
  static I Xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I Min(I a, I b) { return _mm256_min_epi32(a, b); }
  template <int kBits>
  static I ShiftLeft(I x) {
    return _mm256_slli_epi32(x, kBits);
  }
  template <int kBits>
  static I ShiftRight(I x) {
    return _mm256_srli_epi32(x, kBits);
  }
  template <int kBits>
  static I ShiftRightSigned(I x) {
    return _mm256_srai_epi32(x, kBits);
  }

  static M Less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static M Same(M a, M b) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static uint32_t Packed(M a) { return static_cast<uint32_t>(_mm256_movemask_ps(a)); }
  using Counter = I;
  static Counter Count(Counter count, M a) {
    return _mm256_sub_epi32(count, _mm256_castps_si256(a));
  }

  static double Total(F a) {
    const __m256d pairs = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                                        _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
  static int64_t Total(I a) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtsi128_si32(four);
  }

 private:
  static __m128i Half(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }
  static __m128i Quarter(const void* x) { return _mm_loadl_epi64(static_cast<const __m128i*>(x)); }
  static __m128i PackedInt16(I x) {
    return _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  }
};

#elif defined(LHOPT_VEC_NEON)

struct Vec {
  static constexpr int64_t kWidth = 4;
  using F = float32x4_t;
  using I = int32x4_t;
  using M = uint32x4_t;  // all bits of a lane

  static F Set(float x) { return vdupq_n_f32(x); }
  static F Load(const float* x) { return vld1q_f32(x); }
  static F Load(const Float16* x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits))); }

  static F Store(float* out, F x) {
    vst1q_f32(out, x);
    return x;
  }
  static F Store(Float16* out, F x) {
    const float16x4_t half = vcvt_f16_f32(x);
    vst1_u16(&out->bits, vreinterpret_u16_f16(half));
    return vcvt_f32_f16(half);
  }

  static F Add(F a, F b) { return vaddq_f32(a, b); }
  static F Sub(F a, F b) { return vsubq_f32(a, b); }
  static F Mul(F a, F b) { return vmulq_f32(a, b); }
  static F Div(F a, F b) { return vdivq_f32(a, b); }
  static F MulAdd(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F MulSub(F a, F b, F c) { return vnegq_f32(vfmsq_f32(c, a, b)); }
  static F NegMulAdd(F a, F b, F c) { return vfmsq_f32(c, a, b); }
  static F Sqrt(F a) { return vsqrtq_f32(a); }
  static F Max(F a, F b) { return vmaxq_f32(a, b); }
  static F Min(F a, F b) { return vminnmq_f32(a, b); }
  static float Largest(F a) { return vmaxvq_f32(a); }
  static F Abs(F a) { return vabsq_f32(a); }
  static F Canonical(F x) { return vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(__builtin_nanf(""))); }

  static I SetInts(int32_t x) { return vdupq_n_s32(x); }
  static I LoadInts(const uint32_t* x) { return vreinterpretq_s32_u32(vld1q_u32(x)); }
  static I LoadInts(const int16_t* x) { return vmovl_s16(vld1_s16(x)); }
  static I LoadInts(const uint16_t* x) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(x))); }
  static I LoadInts(const int8_t* x) { return vmovl_s16(vget_low_s16(vmovl_s8(FourBytes(x)))); }
  static I LoadInts(const uint8_t* x) {
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_s8(FourBytes(x)));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
  }
  template <class T>
  static void StoreInts(T* out, I x) {
    const int16x4_t halves = vmovn_s32(x);
    if constexpr (sizeof(T) == 2) {
      vst1_s16(reinterpret_cast<int16_t*>(out), halves);
    } else {
      const int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
      const int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
      std::memcpy(out, &four, sizeof four);
    }
  }
  static F ToFloats(I x) { return vcvtq_f32_s32(x); }
  static I Floor(F x) { return vcvtmq_s32_f32(x); }
  static I BitsOf(F x) { return vreinterpretq_s32_f32(x); }
  static F FromBits(I x) { return vreinterpretq_f32_s32(x); }
  static I Add(I a, I b) { return vaddq_s32(a, b); }
  static I Sub(I a, I b) { return vsubq_s32(a, b); }
  static I And(I a, I b) { return vandq_s32(a, b); }
  static I Xor(I a, I b) { return veorq_s32(a, b); }
  static I Min(I a, I b) { return vminq_s32(a, b); }
  template <int kBits>
  static I ShiftLeft(I x) {
    return vshlq_n_s32(x, kBits);
  }
  template <int kBits>
  static I ShiftRight(I x) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x), kBits));
  }
  template <int kBits>
  static I ShiftRightSigned(I x) {
    return vshrq_n_s32(x, kBits);
  }

  static M Less(F a, F b) { return vcltq_f32(a, b); }
  static M Same(M a, M b) { return vceqq_u32(a, b); }
  static uint32_t Packed(M a) {
    static constexpr uint32_t kBit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(a, vld1q_u32(kBit)));
  }
  using Counter = I;
  static Counter Count(Counter count, M a) { return vsubq_s32(count, vreinterpretq_s32_u32(a)); }

  static double Total(F a) {
    return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a)));
  }
  static int64_t Total(I a) { return vaddvq_s32(a); }

 private:
  static int8x8_t FourBytes(const void* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return vreinterpret_s8_s32(vdup_n_s32(bytes));
  }
};

#else

struct Vec {
  static constexpr int64_t kWidth = 1;
  using F = float;
  using I = int32_t;
  using M = bool;

  static F Set(float x) { return x; }
  template <class T>
  static F Load(const T* x) {
    return ToFloat(*x);
  }
  template <class T>
  static F Store(T* out, F x) {
    FromFloat(x, out);
    return ToFloat(*out);
  }

  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
  static F MulAdd(F a, F b, F c) { return a * b + c; }
  static F MulSub(F a, F b, F c) { return a * b - c; }
  static F NegMulAdd(F a, F b, F c) { return c - a * b; }
  static F Sqrt(F a) { return std::sqrt(a); }
  static F Max(F a, F b) { return a > b ? a : b; }
  static F Min(F a, F b) { return a < b ? a : b; }
  static float Largest(F a) { return a; }
  static F Abs(F a) { return std::fabs(a); }
  static F Canonical(F x) { return x == x ? x : __builtin_nanf(""); }

  static I SetInts(int32_t x) { return x; }
  template <class T>
  static I LoadInts(const T* x) {
    return static_cast<I>(*x);
  }
  template <class T>
  static void StoreInts(T* out, I x) {
    *out = static_cast<T>(x);
  }
  static F ToFloats(I x) { return static_cast<F>(x); }
  static I Floor(F x) {
    const I towards_zero = static_cast<I>(x);
    return towards_zero - (x < static_cast<F>(towards_zero));
  }
  static I BitsOf(F x) { return static_cast<I>(lhopt::BitsOf(x)); }
  static F FromBits(I x) { return FloatFromBits(Unsigned(x)); }
  static I Add(I a, I b) { return static_cast<I>(Unsigned(a) + Unsigned(b)); }
  static I Sub(I a, I b) { return static_cast<I>(Unsigned(a) - Unsigned(b)); }
  static I And(I a, I b) { return a & b; }
  static I Xor(I a, I b) { return a ^ b; }
  static I Min(I a, I b) { return a < b ? a : b; }
  template <int kBits>
  static I ShiftLeft(I x) {
    return static_cast<I>(Unsigned(x) << kBits);
  }
  template <int kBits>
  static I ShiftRight(I x) {
    return static_cast<I>(Unsigned(x) >> kBits);
  }
  template <int kBits>
  static I ShiftRightSigned(I x) {
    return x >> kBits;
  }

  static M Less(F a, F b) { return a < b; }
  static M Same(M a, M b) { return a == b; }
  static uint32_t Packed(M a) { return a; }
  using Counter = I;
  static Counter Count(Counter count, M a) { return count + a; }

  static double Total(F a) { return a; }
  static int64_t Total(I a) { return a; }

 private:
  static uint32_t Unsigned(I x) { return static_cast<uint32_t>(x); }
};

#endif

// Splits x > 0 into 2^(e - 126) times a factor in [1/2, 1): returns the factor, adds e to
// `exponent`.
inline Vec::F TakeExponent(Vec::F x, Vec::I& exponent) {
  const Vec::I bits = Vec::BitsOf(x);
  exponent = Vec::Add(exponent, Vec::ShiftRight<23>(bits));
#if defined(LHOPT_VEC_AVX512)
  return _mm512_getmant_ps(x, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);
#else
  return Vec::FromBits(
      Vec::Add(Vec::And(bits, Vec::SetInts(0x007fffff)), Vec::SetInts(0x3f000000)));
#endif
}

}  // namespace
}  // namespace lhopt
