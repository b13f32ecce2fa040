// The random bits of stochastic rounding: the twin of kernels/rounding.py, which is the definition.
#pragma once

#include <cstdint>

namespace lhopt {

// Whose numbers are rounded, and when.
struct Randomness {
  uint64_t seed;
  uint32_t tensor;  // its index in the layout
  uint32_t step;    // of the tensor, from 1 on
};

struct RandomKeys {
  uint32_t first, second;
};

// Internal linkage: each instruction set compiles its own copy.
namespace {

// A bijection that mixes all bits (lowbias32).
inline uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of the elements with this upper half of their position in the tensor.
inline RandomKeys KeysOf(const Randomness& random, uint32_t element_high) {
  const uint32_t words[] = {static_cast<uint32_t>(random.seed),
                            static_cast<uint32_t>(random.seed >> 32), random.tensor, random.step,
                            element_high};
  RandomKeys keys{0x9e3779b9u, 0x85ebca6bu};
  for (const uint32_t word : words) {
    keys.first = Mix(keys.first ^ word);
    keys.second = Mix(keys.second ^ word);
  }
  return keys;
}

// Of the element with this lower half of its position.
inline uint32_t RandomWord(const RandomKeys& keys, uint32_t element_low) {
  return Mix(Mix(element_low + keys.first) ^ keys.second);
}

}  // namespace

}  // namespace lhopt
