// Kernels over slices of any size, with or without elements to step around.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace lhopt {

// What a kernel is instantiated for.
struct Variant {
  DType param;
  DType grad;
  Denominator denominator;
  bool statistics;
};

struct GradientSum {
  double sum_sq;   // over the finite elements
  bool nonfinite;  // whether there are others
};

// Sum of squares without overflow or underflow: a finite gradient is never taken for another.
GradientSum SumGradient(const Kernels& kernels, DType dtype, const void* grad, int64_t size);

// Moments, and what else `pass` says; adds to `sums`.
void UpdateSlice(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                 const Coefficients& coefficients, Sums& sums);

// The parameters' update from stored moments; adds to `sums.new_param_sq`.
void ApplySlice(const Kernels& kernels, const Variant& variant, const Slice& slice,
                const Coefficients& coefficients, Sums& sums);

// The same, leaving alone the elements whose gradient is not finite. They count for the
// parameter's norms and for nothing else.
void UpdateFiniteOnly(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums);
void ApplyFiniteOnly(const Kernels& kernels, const Variant& variant, const Slice& slice,
                     const Coefficients& coefficients, Sums& sums);

// How a piece of a tensor is kept, where that is not how it is stepped.
struct Storage {
  MomentType moments;
  void* exp_avg;  // in place of the slice's where they are not float32
  void* exp_avg_sq;
  uint16_t* exp_avg_scale;  // of codes
  uint16_t* exp_avg_sq_scale;
  Correction correction;
  void* corrections;
  const Randomness* random;  // of parameters that are rounded at random, or null
  uint32_t step;             // of the tensor, from 1 on
  int64_t begin;             // element of the tensor, a multiple of every power of two up to 4,096

  bool keeps_weights() const { return correction == Correction::kNone && random == nullptr; }
  bool keeps_moments() const { return moments == MomentType::kFloat32; }
};

// Calls `operation` with blocks of the slice in which what is kept otherwise has been decoded to
// float32. What it has made of them is stored again where `stores` says so: `sums.new_param_sq` is
// of the result of random rounding, else of what `operation` says.
void ForDecodedBlocks(const Kernels& kernels, const Variant& variant, const Slice& slice,
                      const Storage& storage, bool stores, Sums& sums,
                      const std::function<void(const Variant&, const Slice&)>& operation);

// Replaces the stored gradient signs and returns how many stayed the same. With `masked`, gradients
// that are not finite are stored as not negative and do not count.
int64_t UpdateSigns(const Kernels& kernels, DType dtype, bool masked, const void* grad,
                    int64_t size, float scale, uint8_t* bits);

}  // namespace lhopt
