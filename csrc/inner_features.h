// The inner features of a step, from its table of statistics: the twin of lhopt_fused/features.py,
// which is the definition.
#pragma once

#include <cstdint>
#include <vector>

namespace lhopt {

// In the order of features.ACCUMULATED.
enum FeatureColumn {
  kDidGradClip,
  kSqrtVHatGtEpsilon,
  kMeanLogAbsUpdate,
  kLogTwoRegimesScale,
  kLogUpdateNormOverParamNorm,
  kLogNoiseScale,
  kCosineGradMomentum,
  kCosineGradParam,
  kLogLamb,
  kCosineGradUpdate,
  kLogitCdfCosineGradMomentum,
  kLogitCdfCosineGradUpdate,
  kCdfCosineGradParam,
  kCosineGradPreviousMomentum,
  kSignAgreementPreviousMomentum,
  kSignAgreementConsecutiveGrads,
  kNumFeatures,
  kUpdateNorm = kNumFeatures,
  kAllParamNorm,
  kNumAccumulated
};

class InnerFeatures {
 public:
  // `numel` and `group_of`: one per tensor; `group_clips` and `run_of`: one per group.
  InnerFeatures(std::vector<int64_t> numel, std::vector<int32_t> group_of,
                std::vector<uint8_t> group_clips, std::vector<int32_t> run_of, int32_t num_runs);

  // Adds one step to `sums`, [2, runs, kNumAccumulated]: the features' means over tensors, then
  // over groups, and the norms over tensors, of what was measured; and how often that was.
  // `statistics`: [tensors, kNumStatistics]. One call at a time.
  void Accumulate(const double* statistics, double* sums);

 private:
  // Sums of features and how many were added: not those that are NaN.
  struct Means {
    double total[kNumFeatures];
    double count[kNumFeatures];

    void Add(const double* features);
    void AddMeansOf(const Means& other);
  };

  struct Run {
    Means means;
    double update_sq, param_sq;
    bool takes_part;
  };

  void TensorFeatures(const double* row, int64_t numel, bool clips, double* features) const;
  static void AddStep(const Run& run, double* sums, double* counts);

  const std::vector<int64_t> numel_;
  const std::vector<int32_t> group_of_;
  const std::vector<uint8_t> group_clips_;
  const std::vector<int32_t> run_of_;
  std::vector<Means> groups_;
  std::vector<Run> runs_;
};

}  // namespace lhopt
