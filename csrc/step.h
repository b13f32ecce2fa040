// One optimizer step over all tensors of all groups: what is done when, and by which thread.
//
// Groups belong to training runs that share nothing: a run takes the same step, bit by bit, beside
// others as alone. Tensors are cut into chunks whose size depends on their run's alone. A step is a
// list of tickets, stretches of chunks that threads take in order; a ticket only ever waits for
// earlier ones:
//
//   gradient   norms and finiteness, last chunk first, so that what was read last is used first;
//              whoever finishes the last ticket prepares every tensor's coefficients
//   moments    moments and statistics, and the parameters' update too where the step size is known
//   apply      the parameters' update of tensors whose trust ratio had to wait for the whole
//              tensor's norm; it follows while a bucket of such tensors is still in the cache.
//              Moments of less than 32 bits are stored only now: they are computed again
//
// Where tensors are pieces of larger ones, each of these is a call of its own.
//
// Each chunk owns a row of partial sums. The thread that finishes a tensor's last chunk adds them
// up in chunk order, so that results depend neither on the number of threads nor on their timing.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "rules.h"
#include "slice_ops.h"

namespace lhopt {

struct TensorSpec {
  void* param;
  float* master;      // what is stepped in place of the parameter, which becomes its copy; or null
  void* corrections;  // of split weights
  void* exp_avg;
  void* exp_avg_sq;
  uint16_t* exp_avg_scale;  // of codes
  uint16_t* exp_avg_sq_scale;
  uint8_t* grad_signs;
  int64_t size;
  DType dtype;          // of the parameter
  WeightsType weights;  // what is stepped: the master, if there is one
  MomentType moments;
  int32_t group;
  bool keeps_signs;
  bool is_vector;
};

// Row-major float64 tables owned by the caller; columns in rules.h.
struct Tables {
  const double* scalars;   // [groups, kNumScalars]
  double* group_state;     // [groups, kNumGroupState]
  double* tensor_state;    // [tensors, kNumTensorState]
  int64_t* skipped_steps;  // [runs]
};

struct Gradient {
  const void* data;
  DType dtype;
  bool present;  // else the tensor sits this step out
};

class Step {
 public:
  // `run_of`: one per group, below `num_runs`. `rounding_seed`: of the stochastic rounding of
  // 16-bit parameters without a master, if any.
  Step(std::vector<TensorSpec> tensors, std::vector<GroupOptions> groups,
       std::vector<int32_t> run_of, int32_t num_runs, const Tables& tables, bool masks_nonfinite,
       std::optional<uint64_t> rounding_seed, const Kernels& kernels);

  // `gradients`: one per tensor. `statistics`: [tensors, kNumStatistics], or null. One call at a
  // time.
  void Run(const std::vector<Gradient>& gradients, double* statistics, int num_threads);

  // The same in three phases, one after the other, for tensors that are pieces of larger ones.
  // Between them the caller adds up what the pieces have: `sums` [tensors, kNumGradientSums] is
  // filled and comes back over whole tensors; `partial` [tensors, kNumPartialSums] is filled, and
  // comes back with the step sizes and decay factors of tensors that wait for their trust ratio.
  // What trust ratios remember is the caller's.
  void MeasureGradients(const std::vector<Gradient>& gradients, double* sums, int num_threads);
  void UpdateMoments(const double* sums, double* partial, bool measures, int num_threads);
  void Apply(double* partial, int num_threads);

  size_t num_tensors() const { return specs_.size(); }
  const char* isa() const { return kernels_.name; }

 private:
  // How a tensor takes part in a step.
  enum class Mode : uint8_t {
    kAbsent,
    kOnePass,  // moments and parameters at once
    kTwoPass,  // the trust ratio needs the whole tensor's norm first
  };

  struct Chunk {
    int32_t tensor;
    int64_t begin;
    int64_t size;
  };

  struct Ticket {
    enum Kind : uint8_t { kGradient, kMoments, kApply } kind;
    int32_t first_chunk, end_chunk;
  };

  struct Tensor {
    int32_t first_chunk, end_chunk;
    Gradient gradient;
    Variant variant;
    Coefficients coefficients;
    Dither dither;  // of moments that are not float32
    double clip, learning_rate, step_size, decay_factor;
    bool first_step;
    std::atomic<int32_t> chunks_left{0};        // of the moments
    std::atomic<int32_t> apply_chunks_left{0};  // of the parameters
    std::atomic<bool> step_size_known{false};

    int32_t num_chunks() const { return end_chunk - first_chunk; }
  };

  void CutChunks();
  void PlanTickets();
  void PlanGradientTickets();
  void PlanMomentsTickets();
  template <class Emit>
  void ForTickets(int32_t first_tensor, int32_t end_tensor, const Emit& emit) const;

  bool NeedsGradientPass(int32_t tensor) const;
  bool UsesTrust(int32_t tensor) const;
  Mode ModeOf(int32_t tensor) const;
  bool TakesPart(int32_t tensor) const {
    return modes_[tensor] != Mode::kAbsent && !run_skips_[RunOf(tensor)];
  }
  int32_t RunOf(int32_t tensor) const { return run_of_[specs_[tensor].group]; }
  uint32_t StepOf(int32_t tensor) const {  // the number of this step, from 1 on
    return static_cast<uint32_t>(StateOf(tensor)[kStep]);
  }
  const void* GradientOf(const Chunk& chunk) const;
  Slice SliceOf(const Chunk& chunk) const;
  const GroupOptions& OptionsOf(int32_t tensor) const { return groups_[specs_[tensor].group]; }
  const double* ScalarsOf(int32_t tensor) const {
    return tables_.scalars + specs_[tensor].group * kNumScalars;
  }
  double* StateOf(int32_t tensor) const { return tables_.tensor_state + tensor * kNumTensorState; }

  void Begin(const std::vector<Gradient>& gradients, bool in_phases);
  void RunTickets(size_t first, size_t end, int num_threads);
  void Work();
  void RunGradientTicket(const Ticket& ticket);
  void Prepare();
  void FindNonfinite();
  void CountSkips();
  bool HasNonfinite(int32_t tensor) const;
  double GradientSumSq(int32_t tensor) const;
  double WholeGradientSumSq(int32_t tensor) const;
  void ClipGroups();
  void PrepareTensor(int32_t tensor);
  void SetStepSize(int32_t tensor, double trust);
  bool StepsAtRandom(int32_t tensor) const;
  bool StepsAsKept(int32_t tensor) const;
  template <class Operation>
  void StepPiece(const Chunk& piece, bool finite_only, bool stores, Sums& sums,
                 const Operation& operation);
  int64_t LookAndUpdate(int32_t chunk, Pass pass);
  void RunMoments(int32_t chunk);
  void FinishMoments(int32_t tensor);
  double* StatisticsOf(int32_t tensor) const;
  void WriteStatistics(int32_t tensor, const Sums& sums, double* row) const;
  void RunApply(int32_t chunk);
  void FinishApply(int32_t tensor);

  const std::vector<TensorSpec> specs_;
  const std::vector<GroupOptions> groups_;
  const std::vector<int32_t> run_of_;  // [groups]
  const Tables tables_;
  const bool masks_nonfinite_;
  const std::optional<uint64_t> rounding_seed_;
  const Kernels& kernels_;

  std::unique_ptr<Tensor[]> tensors_;
  std::vector<Chunk> chunks_;
  std::vector<Sums> sums_;                    // [chunks]
  std::vector<GradientSum> gradient_sums_;    // [chunks]
  std::vector<double> group_sum_sq_, clips_;  // [groups]
  std::vector<uint8_t> group_takes_part_;     // [groups]
  int64_t ticket_size_ = 0;                   // elements

  // The plan of the last step, kept as long as every tensor takes part in the same way.
  std::vector<Mode> modes_;  // [tensors]
  std::vector<Ticket> tickets_;
  size_t num_gradient_tickets_ = 0;
  size_t num_early_tickets_ = 0;  // in phases, of gradients and moments
  bool in_phases_ = false;

  // The step that is running.
  double* statistics_ = nullptr;
  const double* whole_sums_ = nullptr;  // in phases, as is `partial_`
  double* partial_ = nullptr;
  std::vector<uint8_t> run_is_bad_;  // [runs] whether a gradient holds NaN or inf
  std::vector<uint8_t> run_skips_;   // [runs]
  std::atomic<size_t> next_ticket_{0};
  size_t end_ticket_ = 0;
  std::atomic<size_t> gradient_tickets_left_{0};
  std::atomic<bool> prepared_{false};
};

}  // namespace lhopt
