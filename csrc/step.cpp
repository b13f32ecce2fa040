#include "step.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "thread_pool.h"

namespace lhopt {
namespace {

// Chunks stream well from 64K elements on; smaller models get smaller ones, to share the work
// evenly. All sizes are multiples of every vector width and of a byte of sign bits.
constexpr int64_t kMaxChunk = 65536;
constexpr int64_t kMinChunk = 4096;
constexpr int64_t kChunksPerModel = 64;
// Below this many elements a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

constexpr int64_t kBytesPerElement = 12;  // parameter, m and v, which both passes touch

int64_t BucketBytes() {
  int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return (cache > 0 ? cache : 16 << 20) / 2;
}

int64_t ChunkSize(int64_t elements) {
  const int64_t even = elements / kChunksPerModel / kMinChunk * kMinChunk;
  return std::clamp(even, kMinChunk, kMaxChunk);
}

}  // namespace

Step::Step(std::vector<TensorSpec> tensors, std::vector<GroupOptions> groups,
           std::vector<int32_t> run_of, int32_t num_runs, const Tables& tables,
           bool masks_nonfinite, std::optional<uint64_t> rounding_seed, const Kernels& kernels)
    : specs_(std::move(tensors)),
      groups_(std::move(groups)),
      run_of_(std::move(run_of)),
      tables_(tables),
      masks_nonfinite_(masks_nonfinite),
      rounding_seed_(rounding_seed),
      kernels_(kernels),
      tensors_(new Tensor[specs_.size()]),
      group_sum_sq_(groups_.size()),
      clips_(groups_.size()),
      group_takes_part_(groups_.size()),
      run_is_bad_(num_runs),
      run_skips_(num_runs) {
  CutChunks();
}

void Step::CutChunks() {
  int64_t elements = 0;
  std::vector<int64_t> run_elements(run_skips_.size());
  for (const TensorSpec& spec : specs_) {
    elements += spec.size;
    run_elements[run_of_[spec.group]] += spec.size;
  }
  ticket_size_ = ChunkSize(elements);
  for (size_t t = 0; t < specs_.size(); ++t) {
    const int64_t size = specs_[t].size;
    const int64_t chunk_size = ChunkSize(run_elements[RunOf(static_cast<int32_t>(t))]);
    tensors_[t].first_chunk = static_cast<int32_t>(chunks_.size());
    int64_t begin = 0;
    do {  // an empty tensor has one chunk too, to be finished by
      chunks_.push_back({static_cast<int32_t>(t), begin, std::min(chunk_size, size - begin)});
      begin += chunk_size;
    } while (begin < size);
    tensors_[t].end_chunk = static_cast<int32_t>(chunks_.size());
  }
  sums_.resize(chunks_.size());
  gradient_sums_.resize(chunks_.size());
}

// ---- Planning: which tickets a step has, given how each tensor takes part ----

// Calls `emit(first_chunk, end_chunk)` for stretches of about one ticket of present elements.
template <class Emit>
void Step::ForTickets(int32_t first_tensor, int32_t end_tensor, const Emit& emit) const {
  int32_t first = tensors_[first_tensor].first_chunk;
  int64_t elements = 0;
  const int32_t end = tensors_[end_tensor - 1].end_chunk;
  for (int32_t chunk = first; chunk < end; ++chunk) {
    if (modes_[chunks_[chunk].tensor] != Mode::kAbsent) elements += chunks_[chunk].size;
    const bool full = chunk + 1 == end || elements + chunks_[chunk + 1].size > ticket_size_;
    if (full) {
      if (elements > 0 || chunk + 1 == end) emit(first, chunk + 1);
      first = chunk + 1;
      elements = 0;
    }
  }
}

void Step::PlanTickets() {
  tickets_.clear();
  if (!specs_.empty()) {
    PlanGradientTickets();
    num_gradient_tickets_ = tickets_.size();
    PlanMomentsTickets();
  }
}

void Step::PlanGradientTickets() {
  bool any = false;
  for (size_t t = 0; t < specs_.size(); ++t) {
    any |= modes_[t] != Mode::kAbsent && NeedsGradientPass(static_cast<int32_t>(t));
  }
  if (!any) return;
  ForTickets(0, static_cast<int32_t>(specs_.size()), [&](int32_t first, int32_t end) {
    tickets_.push_back({Ticket::kGradient, first, end});
  });
  std::reverse(tickets_.begin(), tickets_.end());
}

// Buckets of neighbouring tensors. The apply tickets of a bucket come a little into the moments
// of the next one, so that no thread has to wait for another's last chunk. In phases, they all come
// last.
void Step::PlanMomentsTickets() {
  constexpr int kLag = 4;  // tickets
  const int64_t bucket_elements = BucketBytes() / kBytesPerElement;
  const auto num_tensors = static_cast<int32_t>(specs_.size());
  std::vector<Ticket> waiting;
  int lag = 0;
  const auto flush = [&] {
    tickets_.insert(tickets_.end(), waiting.begin(), waiting.end());
    waiting.clear();
  };
  for (int32_t first = 0; first < num_tensors;) {
    int64_t elements = 0;
    int32_t end = first;
    while (end < num_tensors && (end == first || elements + specs_[end].size <= bucket_elements)) {
      elements += specs_[end++].size;
    }
    lag = kLag;
    ForTickets(first, end, [&](int32_t first_chunk, int32_t end_chunk) {
      if (lag-- == 0 && !in_phases_) flush();
      tickets_.push_back({Ticket::kMoments, first_chunk, end_chunk});
    });
    if (!in_phases_) flush();
    for (int32_t t = end; t-- > first;) {
      if (modes_[t] != Mode::kTwoPass || (tensors_[t].num_chunks() == 1 && !in_phases_)) continue;
      for (int32_t chunk = tensors_[t].end_chunk; chunk-- > tensors_[t].first_chunk;) {
        waiting.push_back({Ticket::kApply, chunk, chunk + 1});
      }
    }
    first = end;
  }
  num_early_tickets_ = tickets_.size();
  flush();
}

bool Step::NeedsGradientPass(int32_t tensor) const {
  return in_phases_ || !masks_nonfinite_ || OptionsOf(tensor).clip != Clip::kNone;
}

bool Step::UsesTrust(int32_t tensor) const {
  const GroupOptions& options = OptionsOf(tensor);
  return options.trust != Trust::kNone &&
         !(options.trust_ignores_vectors && specs_[tensor].is_vector);
}

Step::Mode Step::ModeOf(int32_t tensor) const {
  if (!tensors_[tensor].gradient.present) return Mode::kAbsent;
  if (!UsesTrust(tensor)) return Mode::kOnePass;
  const bool delayed = OptionsOf(tensor).trust == Trust::kDelayed;
  return delayed && !tensors_[tensor].first_step ? Mode::kOnePass : Mode::kTwoPass;
}

const void* Step::GradientOf(const Chunk& chunk) const {
  const Gradient& gradient = tensors_[chunk.tensor].gradient;
  const int64_t bytes = kDTypeSize[static_cast<int>(gradient.dtype)];
  return static_cast<const char*>(gradient.data) + chunk.begin * bytes;
}

Slice Step::SliceOf(const Chunk& chunk) const {
  const TensorSpec& spec = specs_[chunk.tensor];
  const int64_t moment_bytes = kMomentBytes[static_cast<int>(spec.moments)];
  const auto weights = static_cast<int>(spec.weights);
  const int64_t block = spec.moments == MomentType::kCodes ? chunk.begin / kScaleBlock : 0;
  const auto at = [&](void* data, int64_t bytes) {
    return static_cast<char*>(data) + chunk.begin * bytes;
  };
  return {at(spec.master != nullptr ? spec.master : spec.param, kParamBytes[weights]),
          at(spec.corrections, kCorrectionBytes[weights]),
          GradientOf(chunk),
          at(spec.exp_avg, moment_bytes),
          at(spec.exp_avg_sq, moment_bytes),
          spec.exp_avg_scale + block,
          spec.exp_avg_sq_scale + block,
          &tensors_[chunk.tensor].dither,
          chunk.begin % kScaleBlock,
          chunk.size};
}

// ---- Running a step ----

void Step::Run(const std::vector<Gradient>& gradients, double* statistics, int num_threads) {
  statistics_ = statistics;
  whole_sums_ = nullptr;
  partial_ = nullptr;
  Begin(gradients, false);
  if (statistics != nullptr) std::fill_n(statistics, specs_.size() * kNumStatistics, 0.0);
  if (num_gradient_tickets_ == 0) Prepare();
  RunTickets(0, tickets_.size(), num_threads);
  if (masks_nonfinite_) FindNonfinite();
  CountSkips();
}

void Step::MeasureGradients(const std::vector<Gradient>& gradients, double* sums, int num_threads) {
  statistics_ = nullptr;
  whole_sums_ = nullptr;
  Begin(gradients, true);
  RunTickets(0, num_gradient_tickets_, num_threads);
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto t = static_cast<int32_t>(i);
    double* const row = sums + i * kNumGradientSums;
    std::fill_n(row, static_cast<int>(kNumGradientSums), 0.0);
    if (modes_[t] == Mode::kAbsent) continue;
    row[kPresent] = 1.0;
    row[kNonfinite] = HasNonfinite(t) ? 1.0 : 0.0;
    row[kSumSq] = GradientSumSq(t);
  }
}

void Step::UpdateMoments(const double* sums, double* partial, bool measures, int num_threads) {
  whole_sums_ = sums;
  partial_ = partial;
  std::fill_n(partial, specs_.size() * kNumPartialSums, 0.0);
  for (size_t t = 0; t < specs_.size(); ++t) tensors_[t].variant.statistics = measures;
  Prepare();
  RunTickets(num_gradient_tickets_, num_early_tickets_, num_threads);
  CountSkips();
}

void Step::Apply(double* partial, int num_threads) {
  partial_ = partial;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto t = static_cast<int32_t>(i);
    if (modes_[t] != Mode::kTwoPass || !TakesPart(t)) continue;
    const double* const row = partial + i * kNumPartialSums;
    tensors_[t].coefficients.step_size = static_cast<float>(row[kStepSize]);
    tensors_[t].coefficients.decay_factor = static_cast<float>(row[kDecayFactor]);
    tensors_[t].step_size_known.store(true, std::memory_order_relaxed);
  }
  RunTickets(num_early_tickets_, tickets_.size(), num_threads);
}

void Step::Begin(const std::vector<Gradient>& gradients, bool in_phases) {
  std::fill(run_is_bad_.begin(), run_is_bad_.end(), 0);
  std::fill(run_skips_.begin(), run_skips_.end(), 0);
  bool replan = modes_.empty() || in_phases != in_phases_;
  in_phases_ = in_phases;
  modes_.resize(specs_.size());
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto t = static_cast<int32_t>(i);
    Tensor& tensor = tensors_[t];
    tensor.gradient = gradients[t];
    tensor.first_step = StateOf(t)[kStep] == 0;
    tensor.variant = {specs_[t].weights, tensor.gradient.dtype, specs_[t].moments,
                      OptionsOf(t).denominator, statistics_ != nullptr};
    tensor.chunks_left.store(tensor.num_chunks(), std::memory_order_relaxed);
    tensor.apply_chunks_left.store(tensor.num_chunks(), std::memory_order_relaxed);
    tensor.step_size_known.store(false, std::memory_order_relaxed);
    const Mode mode = ModeOf(t);
    replan |= mode != modes_[t];
    modes_[t] = mode;
  }
  if (replan) PlanTickets();
  gradient_tickets_left_.store(num_gradient_tickets_, std::memory_order_relaxed);
  prepared_.store(false, std::memory_order_relaxed);
}

void Step::RunTickets(size_t first, size_t end, int num_threads) {
  int64_t elements = 0;
  for (size_t t = 0; t < specs_.size(); ++t) {
    if (modes_[t] != Mode::kAbsent) elements += specs_[t].size;
  }
  const int64_t useful_threads = 1 + elements / kElementsPerThread;
  next_ticket_.store(first, std::memory_order_relaxed);
  end_ticket_ = end;
  ThreadPool::Instance().Run(static_cast<int>(std::min<int64_t>(num_threads, useful_threads)),
                             [this] { Work(); });
}

void Step::Work() {
  for (;;) {
    const size_t index = next_ticket_.fetch_add(1, std::memory_order_relaxed);
    if (index >= end_ticket_) return;
    const Ticket& ticket = tickets_[index];
    if (ticket.kind == Ticket::kGradient) {
      RunGradientTicket(ticket);
      continue;
    }
    SpinUntil([this] { return prepared_.load(std::memory_order_acquire); });
    for (int32_t chunk = ticket.first_chunk; chunk < ticket.end_chunk; ++chunk) {
      if (!TakesPart(chunks_[chunk].tensor)) continue;
      ticket.kind == Ticket::kMoments ? RunMoments(chunk) : RunApply(chunk);
    }
  }
}

void Step::RunGradientTicket(const Ticket& ticket) {
  for (int32_t i = ticket.end_chunk; i-- > ticket.first_chunk;) {
    const Chunk& chunk = chunks_[i];
    if (modes_[chunk.tensor] == Mode::kAbsent || !NeedsGradientPass(chunk.tensor)) continue;
    gradient_sums_[i] =
        SumGradient(kernels_, tensors_[chunk.tensor].gradient.dtype, GradientOf(chunk), chunk.size);
  }
  const bool is_last = gradient_tickets_left_.fetch_sub(1, std::memory_order_acq_rel) == 1;
  if (is_last && !in_phases_) Prepare();
}

// ---- Between the passes: one thread, everything that is per tensor or per group ----

void Step::Prepare() {
  if (!masks_nonfinite_ || in_phases_) FindNonfinite();
  if (!masks_nonfinite_) run_skips_ = run_is_bad_;
  ClipGroups();
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto t = static_cast<int32_t>(i);
    if (TakesPart(t)) PrepareTensor(t);
  }
  prepared_.store(true, std::memory_order_release);
}

// Marks the tensors whose gradient holds NaN or inf, and their runs.
void Step::FindNonfinite() {
  for (size_t i = 0; i < specs_.size(); ++i) {
    const auto t = static_cast<int32_t>(i);
    if (modes_[t] == Mode::kAbsent || !HasNonfinite(t)) continue;
    run_is_bad_[RunOf(t)] = 1;
    if (double* const row = StatisticsOf(t)) row[kGradNonfinite] = 1.0;
  }
}

bool Step::HasNonfinite(int32_t t) const {
  if (whole_sums_ != nullptr) return whole_sums_[t * kNumGradientSums + kNonfinite] > 0.0;
  return std::any_of(gradient_sums_.begin() + tensors_[t].first_chunk,
                     gradient_sums_.begin() + tensors_[t].end_chunk,
                     [](const GradientSum& sum) { return sum.nonfinite; });
}

void Step::CountSkips() {
  for (size_t run = 0; run < run_is_bad_.size(); ++run) {
    tables_.skipped_steps[run] += run_is_bad_[run];
  }
}

// Of the finite elements, before clipping.
double Step::GradientSumSq(int32_t t) const {
  double sum = 0.0;
  for (int32_t i = tensors_[t].first_chunk; i < tensors_[t].end_chunk; ++i) {
    sum += gradient_sums_[i].sum_sq;
  }
  return sum;
}

double Step::WholeGradientSumSq(int32_t t) const {
  return whole_sums_ != nullptr ? whole_sums_[t * kNumGradientSums + kSumSq] : GradientSumSq(t);
}

void Step::ClipGroups() {
  std::fill(group_sum_sq_.begin(), group_sum_sq_.end(), 0.0);
  std::fill(group_takes_part_.begin(), group_takes_part_.end(), 0);
  for (size_t t = 0; t < specs_.size(); ++t) {
    if (!TakesPart(static_cast<int32_t>(t))) continue;
    const int32_t group = specs_[t].group;
    group_takes_part_[group] = 1;
    if (groups_[group].clip == Clip::kNone) continue;
    group_sum_sq_[group] += WholeGradientSumSq(static_cast<int32_t>(t));
  }
  for (size_t group = 0; group < groups_.size(); ++group) {
    if (!group_takes_part_[group]) continue;
    clips_[group] = ClipCoefficient(std::sqrt(group_sum_sq_[group]), groups_[group],
                                    tables_.scalars + group * kNumScalars,
                                    tables_.group_state + group * kNumGroupState);
  }
}

void Step::PrepareTensor(int32_t t) {
  Tensor& tensor = tensors_[t];
  double* const state = StateOf(t);
  AdvanceBiasCorrections(ScalarsOf(t), state);
  if (specs_[t].moments != MomentType::kFloat32) tensor.dither = DitherOf(StepOf(t));
  tensor.clip = clips_[specs_[t].group];
  tensor.coefficients = CoefficientsOf(tensor.clip, OptionsOf(t), ScalarsOf(t), state);
  tensor.learning_rate = LearningRate(OptionsOf(t), ScalarsOf(t), state);
  const bool knows_trust = UsesTrust(t) && modes_[t] == Mode::kOnePass;
  const double trust =
      knows_trust ? TrustRatio(state[kParamNorm], UpdateNorm(state), ScalarsOf(t)) : 1.0;
  SetStepSize(t, trust);
}

void Step::SetStepSize(int32_t t, double trust) {
  Tensor& tensor = tensors_[t];
  tensor.step_size = tensor.learning_rate * trust;
  tensor.decay_factor = OptionsOf(t).weight_decay == WeightDecay::kDecoupled
                            ? 1.0 - tensor.step_size * ScalarsOf(t)[kWeightDecay]
                            : 1.0;
  tensor.coefficients.step_size = static_cast<float>(tensor.step_size);
  tensor.coefficients.decay_factor = static_cast<float>(tensor.decay_factor);
}

// ---- Moments, and the parameters where the step size is known ----

bool Step::StepsAtRandom(int32_t tensor) const {
  const WeightsType weights = specs_[tensor].weights;
  return rounding_seed_ && weights != WeightsType::kFloat32 && !IsSplit(weights);
}

// Whether a kernel takes the numbers as they are kept.
bool Step::StepsAsKept(int32_t tensor) const {
  return HasKernels(kernels_, tensors_[tensor].variant) && !StepsAtRandom(tensor);
}

// Runs `operation` on the numbers that are stepped; `stores` says whether what it makes of them is
// kept.
template <class Operation>
void Step::StepPiece(const Chunk& piece, bool finite_only, bool stores, Sums& sums,
                     const Operation& operation) {
  const TensorSpec& spec = specs_[piece.tensor];
  const Variant& variant = tensors_[piece.tensor].variant;
  const Slice slice = SliceOf(piece);
  const bool is_random = StepsAtRandom(piece.tensor);
  const Randomness random{rounding_seed_.value_or(0), static_cast<uint32_t>(piece.tensor),
                          StepOf(piece.tensor)};
  const bool widens = finite_only || !StepsAsKept(piece.tensor);
  const Decoding decoding{widens && variant.weights != WeightsType::kFloat32,
                          widens && variant.grad != DType::kFloat32,
                          finite_only && variant.moments != MomentType::kFloat32,
                          is_random ? &random : nullptr, piece.begin};
  if (decoding.weights || decoding.gradients || decoding.moments) {
    ForDecodedBlocks(kernels_, variant, slice, decoding, stores, sums, operation);
  } else {
    operation(variant, slice);
  }
  if (stores && spec.master != nullptr) {
    void* const param =
        static_cast<char*>(spec.param) + piece.begin * kDTypeSize[static_cast<int>(spec.dtype)];
    Narrow(kernels_, spec.master + piece.begin, piece.size, spec.dtype, param);
  }
}

// Where nothing has looked at the gradients before. A kernel that steps numbers as they are kept
// does so on the way: returns how many elements it has stepped.
int64_t Step::LookAndUpdate(int32_t index, Pass pass) {
  const Chunk& chunk = chunks_[index];
  const Tensor& tensor = tensors_[chunk.tensor];
  GradientSum& gradient = gradient_sums_[index];
  Sums& sums = sums_[index];
  int64_t stepped = 0;
  if (StepsAsKept(chunk.tensor)) {
    const auto update = [&](const Variant& variant, const Slice& all) {
      stepped = UpdateLooking(kernels_, variant, pass, all, tensor.coefficients, sums);
    };
    StepPiece(chunk, false, pass != Pass::kMomentsOnly, sums, update);
  }
  const bool is_known =
      !tensor.variant.statistics || (sums.grad_sq >= kSmallestSumSq && std::isfinite(sums.grad_sq));
  gradient = stepped == chunk.size && is_known
                 ? GradientSum{sums.grad_sq, false}
                 : SumGradient(kernels_, tensor.variant.grad, GradientOf(chunk), chunk.size);
  return stepped;
}

void Step::RunMoments(int32_t index) {
  const Chunk& chunk = chunks_[index];
  Tensor& tensor = tensors_[chunk.tensor];
  const void* const grad = GradientOf(chunk);
  const GradientSum& gradient = gradient_sums_[index];
  Sums& sums = sums_[index];
  sums = {};
  const Pass pass = modes_[chunk.tensor] == Mode::kTwoPass ? Pass::kMomentsOnly
                    : UsesTrust(chunk.tensor)              ? Pass::kWithNorms
                                                           : Pass::kPlain;
  const int64_t stepped = NeedsGradientPass(chunk.tensor) ? 0 : LookAndUpdate(index, pass);
  const Chunk rest{chunk.tensor, chunk.begin + stepped, chunk.size - stepped};
  if (rest.size > 0) {
    const auto update = gradient.nonfinite ? UpdateFiniteOnly : UpdateSlice;
    StepPiece(rest, gradient.nonfinite, pass != Pass::kMomentsOnly, sums,
              [&](const Variant& variant, const Slice& part) {
                update(kernels_, variant, pass, part, tensor.coefficients, sums);
              });
  }
  const TensorSpec& spec = specs_[chunk.tensor];
  if (spec.keeps_signs) {
    sums.count_same_sign_grad = static_cast<double>(
        UpdateSigns(kernels_, tensor.variant.grad, gradient.nonfinite, grad, chunk.size,
                    tensor.coefficients.grad_scale, spec.grad_signs + chunk.begin / 8));
  }
  if (tensor.chunks_left.fetch_sub(1, std::memory_order_acq_rel) == 1) FinishMoments(chunk.tensor);
}

void Step::FinishMoments(int32_t t) {
  Tensor& tensor = tensors_[t];
  Sums total{};
  for (int32_t i = tensor.first_chunk; i < tensor.end_chunk; ++i) total += sums_[i];
  if (in_phases_) {
    WriteStatistics(t, total, StatisticsOf(t));
    StatisticsOf(t)[kNewParamSq] = total.new_param_sq;
    return;
  }
  if (UsesTrust(t)) {
    AdvanceUpdateNorm(std::sqrt(total.update_sq), ScalarsOf(t), StateOf(t));
  }
  if (modes_[t] == Mode::kTwoPass) {
    const double param_norm = std::sqrt(total.param_sq);
    SetStepSize(t, TrustRatio(param_norm, UpdateNorm(StateOf(t)), ScalarsOf(t)));
  } else if (UsesTrust(t)) {
    StateOf(t)[kParamNorm] = std::sqrt(total.new_param_sq);
  }
  if (statistics_ != nullptr) WriteStatistics(t, total, StatisticsOf(t));
  if (modes_[t] == Mode::kOnePass) return;
  if (tensor.num_chunks() == 1) {
    RunApply(tensor.first_chunk);  // its arrays are in the innermost caches
  } else {
    tensor.step_size_known.store(true, std::memory_order_release);
  }
}

double* Step::StatisticsOf(int32_t t) const {
  if (partial_ != nullptr) return partial_ + t * kNumPartialSums;
  return statistics_ != nullptr ? statistics_ + t * kNumStatistics : nullptr;
}

void Step::WriteStatistics(int32_t t, const Sums& sums, double* row) const {
  const Tensor& tensor = tensors_[t];
  const double inv_bc1 = 1.0 / StateOf(t)[kBiasCorrection1];
  row[kTaken] = 1.0;
  row[kClipCoefficient] = tensor.clip;
  row[kStepSize] = tensor.step_size;
  row[kDecayFactor] = tensor.decay_factor;
  row[kGradSq] = tensor.clip * tensor.clip * GradientSumSq(t);
  row[kParamSq] = sums.param_sq;
  row[kUpdateSq] = sums.update_sq;
  row[kMHatSq] = sums.m_sq * inv_bc1 * inv_bc1;
  row[kMHatMinusGradSq] = tensor.first_step ? 0.0 : sums.m_hat_minus_grad_sq;
  row[kGradDotParam] = sums.grad_dot_param;
  const double ombeta1 = ScalarsOf(t)[kOmbeta1];
  row[kGradDotMHat] = ((1.0 - ombeta1) * sums.grad_dot_momentum + ombeta1 * row[kGradSq]) * inv_bc1;
  row[kGradDotUpdate] = sums.grad_dot_update;
  row[kCountGtEpsilon] = sums.count_gt_epsilon;
  row[kSumLogAbsUpdate] = sums.sum_log_abs_update;
  row[kGradDotMomentum] = sums.grad_dot_momentum;
  row[kMomentumSq] = sums.momentum_sq;
  row[kCountSameSignMomentum] = sums.count_same_sign_momentum;
  const bool has_signs = specs_[t].keeps_signs && !tensor.first_step;
  row[kCountSameSignGrad] =
      has_signs ? sums.count_same_sign_grad : std::numeric_limits<double>::quiet_NaN();
}

// ---- The parameters of tensors whose trust ratio came last ----

void Step::RunApply(int32_t index) {
  const Chunk& chunk = chunks_[index];
  Tensor& tensor = tensors_[chunk.tensor];
  if (tensor.num_chunks() > 1) {
    SpinUntil([&] { return tensor.step_size_known.load(std::memory_order_acquire); });
  }
  const bool nonfinite = gradient_sums_[index].nonfinite;
  const auto apply = nonfinite ? ApplyFiniteOnly : ApplySlice;
  const auto update = nonfinite ? UpdateFiniteOnly : UpdateSlice;
  const bool again = specs_[chunk.tensor].moments != MomentType::kFloat32;
  Sums& sums = sums_[index];
  sums.new_param_sq = 0.0;
  StepPiece(chunk, nonfinite, true, sums, [&](const Variant& variant, const Slice& part) {
    if (again) {
      Variant silent = variant;
      silent.statistics = false;
      update(kernels_, silent, Pass::kWithNorms, part, tensor.coefficients, sums);
    } else {
      apply(kernels_, variant, part, tensor.coefficients, sums);
    }
  });
  if (tensor.apply_chunks_left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    FinishApply(chunk.tensor);
  }
}

void Step::FinishApply(int32_t t) {
  double new_param_sq = 0.0;
  for (int32_t i = tensors_[t].first_chunk; i < tensors_[t].end_chunk; ++i) {
    new_param_sq += sums_[i].new_param_sq;
  }
  if (in_phases_) {
    StatisticsOf(t)[kNewParamSq] = new_param_sq;
  } else {
    StateOf(t)[kParamNorm] = std::sqrt(new_param_sq);
  }
}

}  // namespace lhopt
