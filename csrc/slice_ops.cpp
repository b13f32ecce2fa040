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
  const auto weights = static_cast<int>(variant.weights);
  const int64_t moment = begin * kMomentBytes[static_cast<int>(variant.moments)];
  const int64_t block = variant.moments == MomentType::kCodes ? begin / kScaleBlock : 0;
  const auto bytes = [](void* data, int64_t offset) { return static_cast<char*>(data) + offset; };
  return {bytes(slice.param, begin * kParamBytes[weights]),
          bytes(slice.corrections, begin * kCorrectionBytes[weights]),
          static_cast<const char*>(slice.grad) + begin * SizeOf(variant.grad),
          bytes(slice.exp_avg, moment),
          bytes(slice.exp_avg_sq, moment),
          slice.exp_avg_scale + block,
          slice.exp_avg_sq_scale + block,
          slice.dither,
          (slice.place + begin) % kScaleBlock,
          size};
}

// Calls `run(kernels, begin, size)` for whole vectors, and for the tail with the scalar kernels.
template <class Function>
void ForVectorsAndTail(const Kernels& kernels, int64_t size, const Function& run) {
  const int64_t tail = size % kernels.width;
  if (size > tail) run(kernels, int64_t{0}, size - tail);
  if (tail > 0) run(kScalarKernels, size - tail, tail);
}

UpdateKernel UpdateKernelOf(const Kernels& kernels, const Variant& v, Pass pass) {
  return kernels.update[static_cast<int>(v.weights)][static_cast<int>(v.grad)][static_cast<int>(
      v.moments)][static_cast<int>(v.denominator)][v.statistics][static_cast<int>(pass)];
}

ApplyKernel ApplyKernelOf(const Kernels& kernels, const Variant& v) {
  return kernels.apply[static_cast<int>(v.weights)][static_cast<int>(v.denominator)];
}

int64_t Update(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
               const Coefficients& coefficients, Sums& sums, bool looks) {
  int64_t stepped = 0;
  ForVectorsAndTail(kernels, slice.size, [&](const Kernels& of, int64_t begin, int64_t size) {
    if (stepped < begin) return;  // one of the vectors before was not finite
    const Slice part = SubSlice(slice, variant, begin, size);
    stepped += UpdateKernelOf(of, variant, pass)(part, coefficients, sums, looks);
  });
  return stepped;
}

int64_t FiniteIndices(const float* grad, int64_t size, int32_t* indices) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; ++i) {
    indices[count] = static_cast<int32_t>(i);
    count += IsFinite(grad[i]);
  }
  return count;
}

double MaskedParamSq(const Slice& slice) {
  const float* const param = static_cast<const float*>(slice.param);
  const float* const grad = static_cast<const float*>(slice.grad);
  double sum = 0.0;
  for (int64_t i = 0; i < slice.size; ++i) {
    const double x = param[i];
    if (!IsFinite(grad[i])) sum += x * x;
  }
  return sum;
}

void Gather(const void* from, const int32_t* indices, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const float*>(from)[indices[i]];
}

void Scatter(const float* from, const int32_t* indices, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<float*>(to)[indices[i]] = from[i];
}

// The elements of a float32 block whose gradient is finite, packed together and put back
// afterwards.
class PackedBlock {
 public:
  explicit PackedBlock(const Slice& slice) : slice_(slice) {
    count_ = FiniteIndices(static_cast<const float*>(slice.grad), slice.size, indices_);
    Gather(slice.param, indices_, count_, param_);
    Gather(slice.grad, indices_, count_, grad_);
    Gather(slice.exp_avg, indices_, count_, exp_avg_);
    Gather(slice.exp_avg_sq, indices_, count_, exp_avg_sq_);
  }

  Slice Packed() {
    Slice packed{};
    packed.param = param_;
    packed.grad = grad_;
    packed.exp_avg = exp_avg_;
    packed.exp_avg_sq = exp_avg_sq_;
    packed.size = count_;
    return packed;
  }

  void PutBack() const {
    Scatter(param_, indices_, count_, slice_.param);
    Scatter(exp_avg_, indices_, count_, slice_.exp_avg);
    Scatter(exp_avg_sq_, indices_, count_, slice_.exp_avg_sq);
  }

 private:
  const Slice& slice_;
  int64_t count_;
  int32_t indices_[kGatherBlock];
  float param_[kGatherBlock], grad_[kGatherBlock];
  float exp_avg_[kGatherBlock], exp_avg_sq_[kGatherBlock];
};

void ReadGradients(const Kernels& kernels, DType dtype, const void* grad, int64_t size, float* to) {
  ForVectorsAndTail(kernels, size, [&](const Kernels& of, int64_t begin, int64_t count) {
    Slice slice{};
    slice.grad = static_cast<const char*>(grad) + begin * SizeOf(dtype);
    slice.size = count;
    of.read_gradients[static_cast<int>(dtype)](slice, to + begin);
  });
}

// A block of a slice, decoded.
class DecodedBlock {
 public:
  DecodedBlock(const Kernels& kernels, const Variant& variant, const Slice& slice,
               const Decoding& decoding, int64_t begin)
      : kernels_(kernels),
        kept_variant_(variant),
        kept_(SubSlice(slice, variant, begin, std::min(kGatherBlock, slice.size - begin))),
        decoding_(decoding),
        begin_(decoding.begin + begin),
        variant_(variant),
        slice_(kept_) {
    if (decoding.weights) DecodeWeights();
    if (decoding.gradients) DecodeGradients();
    if (decoding.moments) DecodeMoments();
  }

  const Variant& variant() const { return variant_; }
  const Slice& slice() const { return slice_; }

  void StoreMoments() const {
    if (!decoding_.moments) return;
    ForKept([&](const Kernels& kernels, const Slice& part, int64_t at) {
      const auto write = kernels.write_moments[static_cast<int>(kept_variant_.moments)];
      write(exp_avg_ + at, exp_avg_sq_ + at, part);
    });
  }

  // Returns the sum of squares of what is stored, where that is all that is left of the weights.
  std::optional<double> StoreWeights() const {
    if (!decoding_.weights) return std::nullopt;
    const auto type = static_cast<int>(kept_variant_.weights);
    ForKept([&](const Kernels& kernels, const Slice& part, int64_t at) {
      if (decoding_.random == nullptr) {
        kernels.write_weights[type](weights_ + at, part);
      } else {
        StoreRandomly(kernels.write_randomly[type], part, at);
      }
    });
    if (IsSplit(kept_variant_.weights)) return std::nullopt;
    return kernels_.sum_of_squares[type](kept_.param, kept_.size, 1.0f);
  }

 private:
  template <class Function>
  void ForKept(const Function& run) const {
    ForVectorsAndTail(kernels_, kept_.size, [&](const Kernels& of, int64_t begin, int64_t size) {
      run(of, SubSlice(kept_, kept_variant_, begin, size), begin);
    });
  }

  void DecodeWeights() {
    ForKept([&](const Kernels& kernels, const Slice& part, int64_t at) {
      kernels.read_weights[static_cast<int>(kept_variant_.weights)](part, weights_ + at);
    });
    variant_.weights = WeightsType::kFloat32;
    slice_.param = weights_;
  }

  void DecodeGradients() {
    ReadGradients(kernels_, kept_variant_.grad, kept_.grad, kept_.size, grad_);
    variant_.grad = DType::kFloat32;
    slice_.grad = grad_;
  }

  void DecodeMoments() {
    ForKept([&](const Kernels& kernels, const Slice& part, int64_t at) {
      const auto read = kernels.read_moments[static_cast<int>(kept_variant_.moments)];
      read(part, exp_avg_ + at, exp_avg_sq_ + at);
    });
    variant_.moments = MomentType::kFloat32;
    slice_.exp_avg = exp_avg_;
    slice_.exp_avg_sq = exp_avg_sq_;
  }

  void StoreRandomly(WriteRandomlyKernel write, const Slice& part, int64_t at) const {
    const auto element = static_cast<uint64_t>(begin_ + at);
    const RandomKeys keys = KeysOf(*decoding_.random, static_cast<uint32_t>(element >> 32));
    write(weights_ + at, keys, static_cast<uint32_t>(element), part);
  }

  const Kernels& kernels_;
  const Variant& kept_variant_;
  const Slice kept_;
  const Decoding& decoding_;
  const int64_t begin_;
  Variant variant_;
  Slice slice_;
  float weights_[kGatherBlock], grad_[kGatherBlock];
  float exp_avg_[kGatherBlock], exp_avg_sq_[kGatherBlock];
};

template <class Step>
void ForPackedBlocks(const Variant& variant, const Slice& slice, const Step& step) {
  for (int64_t begin = 0; begin < slice.size; begin += kGatherBlock) {
    const int64_t size = std::min(kGatherBlock, slice.size - begin);
    const Slice block = SubSlice(slice, variant, begin, size);
    PackedBlock packed(block);
    step(block, packed.Packed());
    packed.PutBack();
  }
}

double SumOfSquaresOfFinite(const Kernels& kernels, DType dtype, const void* grad, int64_t size,
                            float scale) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < size; begin += kGatherBlock) {
    int32_t indices[kGatherBlock];
    float block[kGatherBlock], packed[kGatherBlock];
    const int64_t block_size = std::min(kGatherBlock, size - begin);
    const char* const first = static_cast<const char*>(grad) + begin * SizeOf(dtype);
    ReadGradients(kernels, dtype, first, block_size, block);
    const int64_t count = FiniteIndices(block, block_size, indices);
    Gather(block, indices, count, packed);
    sum += kernels.sum_of_squares[static_cast<int>(DType::kFloat32)](packed, count, scale);
  }
  return sum;
}

}  // namespace

GradientSum SumGradient(const Kernels& kernels, DType dtype, const void* grad, int64_t size) {
  // Powers of two, so that scaling is exact. Up: squares down to 1e-38 of the smallest normal
  // float are kept. Down: squares and sums of the largest float stay in range.
  constexpr float kUp = 0x1p60f, kDown = 0x1p-80f;
  const auto sum_of_squares = kernels.sum_of_squares[static_cast<int>(dtype)];
  const auto unscale = [](double sum, double scale) { return sum / (scale * scale); };

  const double sum = sum_of_squares(grad, size, 1.0f);
  if (std::isfinite(sum)) {
    if (sum >= kSmallestSumSq) return {sum, false};
    return {unscale(sum_of_squares(grad, size, kUp), kUp), false};
  }
  const double scaled = sum_of_squares(grad, size, kDown);
  if (std::isfinite(scaled)) return {unscale(scaled, kDown), false};
  const double finite = SumOfSquaresOfFinite(kernels, dtype, grad, size, 1.0f);
  if (std::isfinite(finite)) return {finite, true};
  return {unscale(SumOfSquaresOfFinite(kernels, dtype, grad, size, kDown), kDown), true};
}

bool HasKernels(const Kernels& kernels, const Variant& variant) {
  return UpdateKernelOf(kernels, variant, Pass::kPlain) != nullptr;
}

void UpdateSlice(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                 const Coefficients& coefficients, Sums& sums) {
  Update(kernels, variant, pass, slice, coefficients, sums, false);
}

int64_t UpdateLooking(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums) {
  return Update(kernels, variant, pass, slice, coefficients, sums, true);
}

void ApplySlice(const Kernels& kernels, const Variant& variant, const Slice& slice,
                const Coefficients& coefficients, Sums& sums) {
  ForVectorsAndTail(kernels, slice.size, [&](const Kernels& of, int64_t begin, int64_t size) {
    ApplyKernelOf(of, variant)(SubSlice(slice, variant, begin, size), coefficients, sums);
  });
}

void UpdateFiniteOnly(const Kernels& kernels, const Variant& variant, Pass pass, const Slice& slice,
                      const Coefficients& coefficients, Sums& sums) {
  ForPackedBlocks(variant, slice, [&](const Slice& block, const Slice& packed) {
    const double masked_sq = MaskedParamSq(block);
    sums.param_sq += masked_sq;
    sums.new_param_sq += masked_sq;
    UpdateSlice(kernels, variant, pass, packed, coefficients, sums);
  });
}

void ApplyFiniteOnly(const Kernels& kernels, const Variant& variant, const Slice& slice,
                     const Coefficients& coefficients, Sums& sums) {
  ForPackedBlocks(variant, slice, [&](const Slice& block, const Slice& packed) {
    sums.new_param_sq += MaskedParamSq(block);
    ApplySlice(kernels, variant, packed, coefficients, sums);
  });
}

void ForDecodedBlocks(const Kernels& kernels, const Variant& variant, const Slice& slice,
                      const Decoding& decoding, bool stores, Sums& sums,
                      const std::function<void(const Variant&, const Slice&)>& operation) {
  for (int64_t begin = 0; begin < slice.size; begin += kGatherBlock) {
    const DecodedBlock block(kernels, variant, slice, decoding, begin);
    const double sum_before = sums.new_param_sq;
    operation(block.variant(), block.slice());
    if (!stores) continue;
    block.StoreMoments();
    const std::optional<double> stored_sq = block.StoreWeights();
    if (stored_sq) sums.new_param_sq = sum_before + *stored_sq;
  }
}

void Narrow(const Kernels& kernels, const float* from, int64_t size, DType dtype, void* to) {
  ForVectorsAndTail(kernels, size, [&](const Kernels& of, int64_t begin, int64_t count) {
    Slice slice{};
    slice.param = static_cast<char*>(to) + begin * SizeOf(dtype);
    slice.size = count;
    of.write_weights[static_cast<int>(dtype)](from + begin, slice);
  });
}

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
