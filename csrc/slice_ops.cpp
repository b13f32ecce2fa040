#include "slice_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "half.h"

namespace lhopt {
namespace {

// Elements gathered at a time; divisible by every vector width.
constexpr int64_t kGatherBlock = 1024;

int64_t SizeOf(DType dtype) { return kDTypeSize[static_cast<int>(dtype)]; }

template <class Function>
auto WithType(DType dtype, const void* data, const Function& function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(static_cast<const BFloat16*>(data));
    case DType::kFloat16:
      return function(static_cast<const Float16*>(data));
    default:
      return function(static_cast<const float*>(data));
  }
}

Slice SubSlice(const Slice& slice, const Variant& variant, int64_t begin, int64_t size) {
  return {static_cast<char*>(slice.param) + begin * SizeOf(variant.param),
          static_cast<const char*>(slice.grad) + begin * SizeOf(variant.grad),
          slice.exp_avg + begin, slice.exp_avg_sq + begin, size};
}

// Whole vectors by one kernel, the tail by its scalar twin.
void RunWithTail(const Kernels& kernels, UpdateKernel vector, UpdateKernel scalar,
                 const Variant& variant, const Slice& slice, const Coefficients& coefficients,
                 Sums& sums) {
  const int64_t tail = slice.size % kernels.width;
  const int64_t whole = slice.size - tail;
  if (whole > 0) vector(SubSlice(slice, variant, 0, whole), coefficients, sums);
  if (tail > 0) scalar(SubSlice(slice, variant, whole, tail), coefficients, sums);
}

UpdateKernel UpdateKernelOf(const Kernels& kernels, const Variant& v, Pass pass) {
  return kernels.update[static_cast<int>(v.param)][static_cast<int>(v.grad)]
                       [static_cast<int>(v.denominator)][v.statistics][static_cast<int>(pass)];
}

UpdateKernel ApplyKernelOf(const Kernels& kernels, const Variant& v) {
  return kernels.apply[static_cast<int>(v.param)][static_cast<int>(v.denominator)];
}

int64_t FiniteIndices(DType dtype, const void* grad, int64_t size, int32_t* indices) {
  return WithType(dtype, grad, [&](const auto* g) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      indices[count] = static_cast<int32_t>(i);
      count += IsFinite(g[i]);
    }
    return count;
  });
}

double MaskedParamSq(const Variant& variant, const Slice& slice) {
  return WithType(variant.param, slice.param, [&](const auto* p) {
    return WithType(variant.grad, slice.grad, [&](const auto* g) {
      double sum = 0.0;
      for (int64_t i = 0; i < slice.size; ++i) {
        const double x = ToFloat(p[i]);
        if (!IsFinite(g[i])) sum += x * x;
      }
      return sum;
    });
  });
}

template <class T>
void Gather(const T* from, const int32_t* indices, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[indices[i]];
}

template <class T>
void Scatter(const T* from, const int32_t* indices, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[indices[i]] = from[i];
}

void GatherBytes(const void* from, int64_t width, const int32_t* indices, int64_t count, void* to) {
  if (width == 2) {
    Gather(static_cast<const uint16_t*>(from), indices, count, static_cast<uint16_t*>(to));
  } else {
    Gather(static_cast<const uint32_t*>(from), indices, count, static_cast<uint32_t*>(to));
  }
}

void ScatterBytes(const void* from, int64_t width, const int32_t* indices, int64_t count,
                  void* to) {
  if (width == 2) {
    Scatter(static_cast<const uint16_t*>(from), indices, count, static_cast<uint16_t*>(to));
  } else {
    Scatter(static_cast<const uint32_t*>(from), indices, count, static_cast<uint32_t*>(to));
  }
}

// The elements of a block whose gradient is finite, packed together and put back afterwards.
class PackedBlock {
 public:
  PackedBlock(const Variant& variant, const Slice& slice) : variant_(variant), slice_(slice) {
    count_ = FiniteIndices(variant.grad, slice.grad, slice.size, indices_);
    GatherBytes(slice.param, SizeOf(variant.param), indices_, count_, param_);
    GatherBytes(slice.grad, SizeOf(variant.grad), indices_, count_, grad_);
    Gather(slice.exp_avg, indices_, count_, exp_avg_);
    Gather(slice.exp_avg_sq, indices_, count_, exp_avg_sq_);
  }

  Slice Packed() { return {param_, grad_, exp_avg_, exp_avg_sq_, count_}; }

  void PutBack() const {
    ScatterBytes(param_, SizeOf(variant_.param), indices_, count_, slice_.param);
    Scatter(exp_avg_, indices_, count_, slice_.exp_avg);
    Scatter(exp_avg_sq_, indices_, count_, slice_.exp_avg_sq);
  }

 private:
  const Variant& variant_;
  const Slice& slice_;
  int64_t count_;
  int32_t indices_[kGatherBlock];
  uint32_t param_[kGatherBlock], grad_[kGatherBlock];  // room for either width
  float exp_avg_[kGatherBlock], exp_avg_sq_[kGatherBlock];
};

// Of one step of a tensor, from 1 on; see kernels/formats.py.
Dither DitherOf(uint32_t step) {
  constexpr uint32_t kPlaceStep = 37345;
  const uint32_t first = Mix(step);
  Dither dither;
  for (uint32_t i = 0; i < kScaleBlock; ++i) {
    dither.words[i] = (first + kPlaceStep * i) & 0xffffu;
    dither.shares[i] = static_cast<float>(dither.words[i]) * 0x1p-16f;
  }
  return dither;
}

// A block of a slice, decoded.
class DecodedBlock {
 public:
  DecodedBlock(const Kernels& kernels, const Variant& variant, const Slice& slice,
               const Storage& storage, int64_t at)
      : kernels_(kernels), stored_type_(variant.param), storage_(storage), variant_(variant) {
    slice_.size = std::min(kGatherBlock, slice.size - at);
    param_ = static_cast<char*>(slice.param) + at * SizeOf(variant.param);
    slice_.grad = static_cast<const char*>(slice.grad) + at * SizeOf(variant.grad);
    slice_.param = param_;
    if (!storage.keeps_weights()) DecodeWeights(at);
    if (storage.keeps_moments()) {
      slice_.exp_avg = slice.exp_avg + at;
      slice_.exp_avg_sq = slice.exp_avg_sq + at;
    } else {
      DecodeMoments(at);
    }
    storage_.begin += at;
  }

  const Variant& variant() const { return variant_; }
  const Slice& slice() const { return slice_; }

  void StoreMoments(const Dither& dither) const {
    if (storage_.moments == MomentType::kCodes) {
      kernels_.encode(decoded_avg_, decoded_avg_sq_, slice_.size, dither, codes_);
    } else if (storage_.moments == MomentType::kBFloat16) {
      kernels_.narrow_dithered(decoded_avg_, slice_.size, dither, codes_.exp_avg);
      kernels_.narrow_dithered(decoded_avg_sq_, slice_.size, dither, codes_.exp_avg_sq);
    }
  }

  // Returns the sum of squares of what is stored, where chance has a say in it.
  std::optional<double> StoreWeights() const {
    if (storage_.correction != Correction::kNone) {
      kernels_.split[static_cast<int>(storage_.correction)](weights_, slice_.size, param_,
                                                            corrections_);
    } else if (storage_.random != nullptr) {
      const auto element = static_cast<uint64_t>(storage_.begin);
      const RandomKeys keys = KeysOf(*storage_.random, static_cast<uint32_t>(element >> 32));
      return kernels_.narrow_randomly[static_cast<int>(stored_type_)](
          weights_, slice_.size, keys, static_cast<uint32_t>(element), param_);
    }
    return std::nullopt;
  }

 private:
  void DecodeWeights(int64_t at) {
    const int64_t width = storage_.correction == Correction::k16Bits ? 2 : 1;
    if (storage_.correction != Correction::kNone) {
      corrections_ = static_cast<char*>(storage_.corrections) + at * width;
      kernels_.join[static_cast<int>(storage_.correction)](param_, corrections_, slice_.size,
                                                           weights_);
    } else {
      kernels_.widen[static_cast<int>(stored_type_)](param_, slice_.size, weights_);
    }
    slice_.param = weights_;
    variant_.param = DType::kFloat32;
  }

  void DecodeMoments(int64_t at) {
    const bool are_codes = storage_.moments == MomentType::kCodes;
    const int64_t width = are_codes ? 1 : 2;
    codes_.exp_avg = static_cast<int8_t*>(storage_.exp_avg) + at * width;
    codes_.exp_avg_sq = static_cast<uint8_t*>(storage_.exp_avg_sq) + at * width;
    if (are_codes) {
      codes_.exp_avg_scale = storage_.exp_avg_scale + at / kScaleBlock;
      codes_.exp_avg_sq_scale = storage_.exp_avg_sq_scale + at / kScaleBlock;
      kernels_.decode(codes_, slice_.size, decoded_avg_, decoded_avg_sq_);
    } else {
      const auto widen = kernels_.widen[static_cast<int>(DType::kBFloat16)];
      widen(codes_.exp_avg, slice_.size, decoded_avg_);
      widen(codes_.exp_avg_sq, slice_.size, decoded_avg_sq_);
    }
    slice_.exp_avg = decoded_avg_;
    slice_.exp_avg_sq = decoded_avg_sq_;
  }

  const Kernels& kernels_;
  const DType stored_type_;
  Storage storage_;
  Variant variant_;
  Slice slice_{};
  void* param_;
  void* corrections_ = nullptr;
  Codes codes_{};
  float weights_[kGatherBlock], decoded_avg_[kGatherBlock], decoded_avg_sq_[kGatherBlock];
};

template <class Step>
void ForPackedBlocks(const Variant& variant, const Slice& slice, const Step& step) {
  for (int64_t begin = 0; begin < slice.size; begin += kGatherBlock) {
    const int64_t size = std::min(kGatherBlock, slice.size - begin);
    const Slice block = SubSlice(slice, variant, begin, size);
    PackedBlock packed(variant, block);
    step(block, packed.Packed());
    packed.PutBack();
  }
}

double SumOfSquaresOfFinite(const Kernels& kernels, DType dtype, const void* grad, int64_t size,
                            float scale) {
  const int64_t width = SizeOf(dtype);
  double sum = 0.0;
  for (int64_t begin = 0; begin < size; begin += kGatherBlock) {
    int32_t indices[kGatherBlock];
    uint32_t packed[kGatherBlock];
    const char* block = static_cast<const char*>(grad) + begin * width;
    const int64_t count =
        FiniteIndices(dtype, block, std::min(kGatherBlock, size - begin), indices);
    GatherBytes(block, width, indices, count, packed);
    sum += kernels.sum_of_squares[static_cast<int>(dtype)](packed, count, scale);
  }
  return sum;
}

}  // namespace

GradientSum SumGradient(const Kernels& kernels, DType dtype, const void* grad, int64_t size) {
  // Powers of two, so that scaling is exact. Up: squares down to 1e-38 of the smallest normal
  // float are kept. Down: squares and sums of the largest float stay in range.
  constexpr float kUp = 0x1p60f, kDown = 0x1p-80f;
  constexpr double kTiny = 1e-24;  // below, squares of some elements may have been lost
  const auto sum_of_squares = kernels.sum_of_squares[static_cast<int>(dtype)];
  const auto unscale = [](double sum, double scale) { return sum / (scale * scale); };

  const double sum = sum_of_squares(grad, size, 1.0f);
  if (std::isfinite(sum)) {
    if (sum >= kTiny) return {sum, false};
    return {unscale(sum_of_squares(grad, size, kUp), kUp), false};
  }
  const double scaled = sum_of_squares(grad, size, kDown);
  if (std::isfinite(scaled)) return {unscale(scaled, kDown), false};
  const double finite = SumOfSquaresOfFinite(kernels, dtype, grad, size, 1.0f);
  if (std::isfinite(finite)) return {finite, true};
  return {unscale(SumOfSquaresOfFinite(kernels, dtype, grad, size, kDown), kDown), true};
}

void UpdateSlice(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                 const Coefficients& coefficients, Sums& sums) {
  RunWithTail(kernels, UpdateKernelOf(kernels, variant, pass),
              UpdateKernelOf(kScalarKernels, variant, pass), variant, slice, coefficients, sums);
}

void ApplySlice(const Kernels& kernels, const Variant& variant, const Slice& slice,
                const Coefficients& coefficients, Sums& sums) {
  RunWithTail(kernels, ApplyKernelOf(kernels, variant), ApplyKernelOf(kScalarKernels, variant),
              variant, slice, coefficients, sums);
}

void UpdateFiniteOnly(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums) {
  ForPackedBlocks(variant, slice, [&](const Slice& block, const Slice& packed) {
    const double masked_sq = MaskedParamSq(variant, block);
    sums.param_sq += masked_sq;
    sums.new_param_sq += masked_sq;
    UpdateSlice(kernels, variant, pass, packed, coefficients, sums);
  });
}

void ApplyFiniteOnly(const Kernels& kernels, const Variant& variant, const Slice& slice,
                     const Coefficients& coefficients, Sums& sums) {
  ForPackedBlocks(variant, slice, [&](const Slice& block, const Slice& packed) {
    sums.new_param_sq += MaskedParamSq(variant, block);
    ApplySlice(kernels, variant, packed, coefficients, sums);
  });
}

void ForDecodedBlocks(const Kernels& kernels, const Variant& variant, const Slice& slice,
                      const Storage& storage, bool stores, Sums& sums,
                      const std::function<void(const Variant&, const Slice&)>& operation) {
  const Dither dither = DitherOf(storage.step);
  for (int64_t at = 0; at < slice.size; at += kGatherBlock) {
    DecodedBlock block(kernels, variant, slice, storage, at);
    const double sum_before = sums.new_param_sq;
    operation(block.variant(), block.slice());
    if (!stores) continue;
    block.StoreMoments(dither);
    const std::optional<double> stored_sq = block.StoreWeights();
    if (stored_sq) sums.new_param_sq = sum_before + *stored_sq;
  }
}

int64_t UpdateSigns(const Kernels& kernels, DType dtype, bool masked, const void* grad,
                    int64_t size, float scale, uint8_t* bits) {
  if (!masked) return kernels.pack_signs[static_cast<int>(dtype)](grad, size, scale, bits);
  return WithType(dtype, grad, [&](const auto* g) {
    int64_t same = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool finite = IsFinite(g[i]);
      const unsigned bit = 1u << (i % 8);
      const bool was_negative = bits[i / 8] & bit;
      const bool is_negative = finite && ToFloat(g[i]) * scale < 0.0f;
      same += finite && was_negative == is_negative;
      bits[i / 8] = static_cast<uint8_t>(is_negative ? bits[i / 8] | bit : bits[i / 8] & ~bit);
    }
    return same;
  });
}

}  // namespace lhopt
