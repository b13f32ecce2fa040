// The 16-bit float formats in portable integer arithmetic: tails, masks and the scalar kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace lhopt {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Internal linkage: each instruction set compiles its own copy.
namespace {

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float FloatFromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float ToFloat(float x) { return x; }

inline float ToFloat(BFloat16 x) { return FloatFromBits(uint32_t{x.bits} << 16); }

inline float ToFloat(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return FloatFromBits(sign | 0x7f800000u | (magnitude << 13));
  // Shifting puts the exponent 112 too low, for subnormals too: a multiplication repairs both.
  const float scaled = FloatFromBits(magnitude << 13) * 0x1p112f;
  return FloatFromBits(sign | BitsOf(scaled));
}

// Round to nearest even, NaN stays NaN.
inline void FromFloat(float x, float* out) { *out = x; }

inline void FromFloat(float x, Float16* out) {
  const uint32_t bits = BitsOf(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at the right bit
    half = BitsOf(FloatFromBits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// One of the two numbers of a 16-bit format around x, the farther one as often as x is near it;
// `word` is random. What lies beyond the largest number, or is none, stays as it is.
inline float Neighbour(float x, uint32_t, float) { return x; }

inline float Neighbour(float x, uint32_t word, BFloat16) {
  constexpr uint32_t kLargest = 0x7f7f0000u;
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + (word >> 16)) & 0xffff0000u;
  return FloatFromBits((bits & 0x7fffffffu) <= kLargest ? rounded : bits);
}

inline float Neighbour(float x, uint32_t word, Float16) {
  constexpr uint32_t kLargest = 0x477fe000u, kSmallestNormal = 0x38800000u;
  const uint32_t bits = BitsOf(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (bits + (word >> 19)) & 0xffffe000u;
  // Below the normal numbers lie the multiples of 2^-24.
  const float multiple = FloatFromBits(magnitude < kSmallestNormal ? magnitude : 0) * 0x1p24f;
  const float below = static_cast<float>(static_cast<int32_t>(multiple));
  const float chance = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
  const float nearer = (below + (chance < multiple - below ? 1.0f : 0.0f)) * 0x1p-24f;
  const uint32_t subnormal = BitsOf(nearer) | (bits & 0x80000000u);
  const uint32_t rounded = magnitude < kSmallestNormal ? subnormal : normal;
  return FloatFromBits(magnitude <= kLargest ? rounded : bits);
}

inline bool IsFinite(float x) { return (BitsOf(x) & 0x7f800000u) != 0x7f800000u; }
inline bool IsFinite(BFloat16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }
inline bool IsFinite(Float16 x) { return (x.bits & 0x7c00u) != 0x7c00u; }

}  // namespace

}  // namespace lhopt
