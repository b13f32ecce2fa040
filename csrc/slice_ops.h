// Kernels over slices of any size, with or without elements to step around.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace lhopt {

// What a kernel is instantiated for.
struct Variant {
  WeightsType weights;
  DType grad;
  MomentType moments;
  Denominator denominator;
  bool statistics;
};

struct GradientSum {
  double sum_sq;   // over the finite elements
  bool nonfinite;  // whether there are others
};

// Below this sum, squares of some elements may have been lost.
inline constexpr double kSmallestSumSq = 1e-24;

// Sum of squares without overflow or underflow: a finite gradient is never taken for another.
GradientSum SumGradient(const Kernels& kernels, DType dtype, const void* grad, int64_t size);

// Moments, and what else `pass` says; adds to `sums`.
void UpdateSlice(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                 const Coefficients& coefficients, Sums& sums);

// The same with a look at the gradients: returns how many elements come before those that are not
// finite, and are stepped.
int64_t UpdateLooking(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums);

// The parameters' update from stored float32 moments; adds to `sums.new_param_sq`.
void ApplySlice(const Kernels& kernels, const Variant& variant, const Slice& slice,
                const Coefficients& coefficients, Sums& sums);

// The same, leaving alone the elements whose gradient is not finite. They count for the
// parameter's norms and for nothing else. All numbers are float32, decoded if need be.
void UpdateFiniteOnly(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums);
void ApplyFiniteOnly(const Kernels& kernels, const Variant& variant, const Slice& slice,
                     const Coefficients& coefficients, Sums& sums);

// What becomes float32 for the time of the step, because no kernel steps it as it is kept.
struct Decoding {
  bool weights;
  bool gradients;
  bool moments;
  const Randomness* random;  // by which the weights are rounded afterwards, or null
  int64_t begin;             // the slice's first element in the tensor
};

// Whether weights and gradients can be stepped as they are kept.
bool HasKernels(const Kernels& kernels, const Variant& variant);

// Calls `operation` with blocks of the slice that are decoded so. What it has made of them is
// stored again where `stores` says so: then `sums.new_param_sq` is of what is stored, or of the
// masters where these are split.
void ForDecodedBlocks(const Kernels& kernels, const Variant& variant, const Slice& slice,
                      const Decoding& decoding, bool stores, Sums& sums,
                      const std::function<void(const Variant&, const Slice&)>& operation);

// Any size. To the nearest number of `dtype`.
void Narrow(const Kernels& kernels, const float* from, int64_t size, DType dtype, void* to);

// Of one step of a tensor, from 1 on; see kernels/formats.py.
Dither DitherOf(uint32_t step);

// Replaces the stored gradient signs and returns how many stayed the same. With `masked`, gradients
// that are not finite are stored as not negative and do not count.
int64_t UpdateSigns(const Kernels& kernels, DType dtype, bool masked, const void* grad,
                    int64_t size, float scale, uint8_t* bits);

}  // namespace lhopt
