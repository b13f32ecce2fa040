// The Python module lhopt_fused._C. Everything that crosses this boundary is checked here: tensors
// come as addresses, element counts and dtype codes, so that no torch headers are needed.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "inner_features.h"
#include "step.h"

namespace py = pybind11;

namespace lhopt {

void BindPlacement(py::module_& m);     // in placement_bindings.cpp
void BindPolicyRunner(py::module_& m);  // in policy_bindings.cpp

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// `message` is a string or, where building it costs, a function that returns one.
template <class Message>
void Require(bool condition, const Message& message) {
  if (condition) return;
  if constexpr (std::is_invocable_v<Message>) {
    throw py::value_error(message());
  } else {
    throw py::value_error(message);
  }
}

std::string At(const char* what, size_t index) {
  return std::string(what) + "[" + std::to_string(index) + "]";
}

template <class T>
T* Pointer(uintptr_t address, const char* name) {
  Require(address % alignof(T) == 0,
          [&] { return std::string(name) + " is not aligned to its element size"; });
  return reinterpret_cast<T*>(address);
}

template <class T>
T* RequiredPointer(uintptr_t address, const char* name) {
  Require(address != 0, [&] { return std::string(name) + " is a null pointer"; });
  return Pointer<T>(address, name);
}

template <class Enum, class Name>
Enum Checked(int value, int count, const Name& name) {
  Require(value >= 0 && value < count, [&] {
    return name() + " is " + std::to_string(value) + ", expected 0 to " + std::to_string(count - 1);
  });
  return static_cast<Enum>(value);
}

template <class Name>
void CheckElementAlignment(uintptr_t address, DType dtype, const Name& name) {
  Require(address % kDTypeSize[static_cast<int>(dtype)] == 0,
          [&] { return name() + " is not aligned to its element size"; });
}

auto Named(const char* name) {
  return [name] { return std::string(name); };
}

GroupOptions MakeGroup(int denominator, int weight_decay, int clip, int trust,
                       bool trust_ignores_vectors, bool radam_warmup, bool maximize) {
  return {Checked<Denominator>(denominator, kNumDenominators, Named("denominator")),
          Checked<WeightDecay>(weight_decay, 2, Named("weight_decay")),
          Checked<Clip>(clip, 4, Named("clip")),
          Checked<Trust>(trust, 3, Named("trust")),
          trust_ignores_vectors,
          radam_warmup,
          maximize};
}

// Where a bfloat16 parameter's correction is, and its bits.
using CorrectionPlace = std::pair<uintptr_t, int>;
// Where the scales of both moments' codes are.
using ScalePlaces = std::pair<uintptr_t, uintptr_t>;

WeightsType CheckedWeights(const std::optional<CorrectionPlace>& correction, DType param_dtype,
                           bool has_master, int64_t size) {
  if (!correction)
    return has_master ? WeightsType::kFloat32 : static_cast<WeightsType>(param_dtype);
  const auto [address, bits] = *correction;
  Require(bits == 8 || bits == 16, "a correction has 8 or 16 bits");
  Require(param_dtype == DType::kBFloat16 && !has_master,
          "a correction is that of a bfloat16 parameter without a master");
  Require(size == 0 || address != 0, "correction is a null pointer");
  Require(address % (bits / 8) == 0, "correction is not aligned to its element size");
  return bits == 8 ? WeightsType::kSplit8 : WeightsType::kSplit16;
}

void CheckMoments(MomentType type, uintptr_t exp_avg, uintptr_t exp_avg_sq,
                  const std::optional<ScalePlaces>& scales, int64_t size) {
  const uintptr_t width = kMomentBytes[static_cast<int>(type)];
  Require(exp_avg % width == 0, "exp_avg is not aligned to its element size");
  Require(exp_avg_sq % width == 0, "exp_avg_sq is not aligned to its element size");
  Require((type == MomentType::kCodes) == scales.has_value(), "codes and nothing else has scales");
  if (!scales) return;
  Require(size % kScaleBlock == 0, "codes come in whole blocks of 64");
  Require(size == 0 || (scales->first != 0 && scales->second != 0), "a scale is a null pointer");
}

TensorSpec MakeTensor(uintptr_t param, int dtype, std::optional<uintptr_t> master,
                      std::optional<CorrectionPlace> correction, int64_t size, int moments,
                      uintptr_t exp_avg, uintptr_t exp_avg_sq, std::optional<ScalePlaces> scales,
                      std::optional<uintptr_t> grad_signs, int group, bool is_vector) {
  Require(size >= 0, "size is negative");
  Require(size == 0 || (param != 0 && exp_avg != 0 && exp_avg_sq != 0),
          "param, exp_avg or exp_avg_sq is a null pointer");
  Require(size == 0 || grad_signs != uintptr_t{0}, "grad_signs is a null pointer");
  Require(size == 0 || master != uintptr_t{0}, "master is a null pointer");
  const DType param_dtype = Checked<DType>(dtype, kNumDTypes, Named("dtype"));
  CheckElementAlignment(param, param_dtype, Named("param"));
  Require(!master || param_dtype != DType::kFloat32, "a float32 parameter needs no master");
  const auto moment_type = Checked<MomentType>(moments, kNumMomentTypes, Named("moments"));
  CheckMoments(moment_type, exp_avg, exp_avg_sq, scales, size);
  const WeightsType weights = CheckedWeights(correction, param_dtype, master.has_value(), size);
  const auto [avg_scale, avg_sq_scale] = scales.value_or(ScalePlaces{0, 0});
  return {reinterpret_cast<void*>(param),
          Pointer<float>(master.value_or(0), "master"),
          reinterpret_cast<void*>(correction.value_or(CorrectionPlace{0, 0}).first),
          reinterpret_cast<void*>(exp_avg),
          reinterpret_cast<void*>(exp_avg_sq),
          Pointer<uint16_t>(avg_scale, "exp_avg_scale"),
          Pointer<uint16_t>(avg_sq_scale, "exp_avg_sq_scale"),
          reinterpret_cast<uint8_t*>(grad_signs.value_or(0)),
          size,
          param_dtype,
          weights,
          moment_type,
          group,
          grad_signs.has_value(),
          is_vector};
}

template <class Name>
void CheckIndex(int32_t index, size_t count, const Name& name, const char* what) {
  Require(index >= 0 && static_cast<size_t>(index) < count, [&] {
    return name() + " is " + std::to_string(index) + ", but there are " + std::to_string(count) +
           " " + what;
  });
}

void CheckRuns(const std::vector<int32_t>& run_of, size_t groups, size_t runs) {
  Require(run_of.size() == groups, "run_of has " + std::to_string(run_of.size()) + " entries for " +
                                       std::to_string(groups) + " groups");
  for (size_t i = 0; i < groups; ++i) {
    CheckIndex(run_of[i], runs, [&] { return At("run_of", i); }, "runs");
  }
}

// A step and its buffers for the addresses that come with each call.
class PyStep {
 public:
  PyStep(std::vector<TensorSpec> tensors, std::vector<GroupOptions> groups,
         std::vector<int32_t> run_of, size_t num_runs, uintptr_t scalars, uintptr_t group_state,
         uintptr_t tensor_state, uintptr_t skipped_steps, bool masks_nonfinite,
         std::optional<uint64_t> rounding_seed) {
    CheckRuns(run_of, groups.size(), num_runs);
    for (size_t i = 0; i < tensors.size(); ++i) {
      CheckIndex(
          tensors[i].group, groups.size(), [&] { return At("tensors", i) + ".group"; }, "groups");
      sizes_.push_back(tensors[i].size);
    }
    const bool needed = !tensors.empty();
    const auto table = [&](uintptr_t address, const char* name) {
      return needed ? RequiredPointer<double>(address, name) : nullptr;
    };
    const Tables tables{table(scalars, "scalars"), table(group_state, "group_state"),
                        table(tensor_state, "tensor_state"),
                        RequiredPointer<int64_t>(skipped_steps, "skipped_steps")};
    gradients_.resize(tensors.size());
    step_ = std::make_unique<Step>(std::move(tensors), std::move(groups), std::move(run_of),
                                   static_cast<int32_t>(num_runs), tables, masks_nonfinite,
                                   rounding_seed, ActiveKernels());
  }

  // One of each for every tensor: where its gradient is, and of what dtype, or kNoGradient.
  void SetGradients(const Array<int64_t>& addresses, const Array<int8_t>& dtypes) {
    const auto count = static_cast<py::ssize_t>(sizes_.size());
    Require(addresses.size() == count && dtypes.size() == count, [&] {
      return "expected " + std::to_string(count) + " addresses and dtypes of gradients, got " +
             std::to_string(addresses.size()) + " and " + std::to_string(dtypes.size());
    });
    CheckIdle();
    for (size_t i = 0; i < sizes_.size(); ++i) {
      gradients_[i] =
          CheckedGradient(static_cast<uintptr_t>(addresses.data()[i]), dtypes.data()[i], i);
    }
  }

  void Run(uintptr_t statistics, int num_threads) {
    double* const table = Pointer<double>(statistics, "statistics");
    RunAlone(num_threads, [&] { step_->Run(gradients_, table, num_threads); });
    phase_ = 0;
  }

  void MeasureGradients(uintptr_t sums, int num_threads) {
    double* const table = RequiredPointer<double>(sums, "sums");
    RunAlone(num_threads, [&] { step_->MeasureGradients(gradients_, table, num_threads); });
    phase_ = 1;
  }

  void UpdateMoments(uintptr_t sums, uintptr_t partial, bool measures, int num_threads) {
    Require(phase_ == 1, "update_moments comes after measure_gradients");
    const double* const whole = RequiredPointer<double>(sums, "sums");
    double* const table = RequiredPointer<double>(partial, "partial");
    RunAlone(num_threads, [&] { step_->UpdateMoments(whole, table, measures, num_threads); });
    phase_ = 2;
  }

  void Apply(uintptr_t partial, int num_threads) {
    Require(phase_ == 2, "apply comes after update_moments");
    double* const table = RequiredPointer<double>(partial, "partial");
    RunAlone(num_threads, [&] { step_->Apply(table, num_threads); });
    phase_ = 0;
  }

  std::string isa() const { return step_->isa(); }

 private:
  template <class Work>
  void RunAlone(int num_threads, const Work& work) {
    Require(num_threads >= 1, "num_threads must be at least 1, got " + std::to_string(num_threads));
    CheckIdle();
    running_ = true;
    {
      const py::gil_scoped_release release;
      work();
    }
    running_ = false;
  }

  void CheckIdle() const {
    if (running_) throw std::runtime_error("this step is already running in another thread");
  }

  Gradient CheckedGradient(uintptr_t address, int code, size_t index) const {
    if (code == kNoGradient) return {};
    const auto name = [&] { return At("addresses", index); };
    Require(address != 0 || sizes_[index] == 0, [&] { return name() + " is null"; });
    const DType dtype = Checked<DType>(code, kNumDTypes, [&] { return At("dtypes", index); });
    CheckElementAlignment(address, dtype, name);
    return {reinterpret_cast<const void*>(address), dtype, true};
  }

  std::vector<int64_t> sizes_;
  std::vector<Gradient> gradients_;  // none at first
  std::unique_ptr<Step> step_;
  bool running_ = false;  // guarded by the GIL
  int phase_ = 0;         // how many of the phases of a step have been done
};

class PyInnerFeatures {
 public:
  PyInnerFeatures(std::vector<int64_t> numel, std::vector<int32_t> group_of,
                  std::vector<uint8_t> group_clips, std::vector<int32_t> run_of, size_t num_runs) {
    CheckRuns(run_of, group_clips.size(), num_runs);
    Require(numel.size() == group_of.size(), "numel has " + std::to_string(numel.size()) +
                                                 " entries for " + std::to_string(group_of.size()) +
                                                 " tensors");
    for (size_t i = 0; i < numel.size(); ++i) {
      Require(numel[i] >= 0, [&] { return At("numel", i) + " is negative"; });
      CheckIndex(group_of[i], group_clips.size(), [&] { return At("group_of", i); }, "groups");
    }
    features_ = std::make_unique<InnerFeatures>(std::move(numel), std::move(group_of),
                                                std::move(group_clips), std::move(run_of),
                                                static_cast<int32_t>(num_runs));
  }

  // Keeps the GIL, which guards what it works in; it takes microseconds.
  void Accumulate(uintptr_t statistics, uintptr_t sums) {
    features_->Accumulate(RequiredPointer<double>(statistics, "statistics"),
                          RequiredPointer<double>(sums, "sums"));
  }

 private:
  std::unique_ptr<InnerFeatures> features_;
};

void BindInnerFeatures(py::module_& m) {
  py::class_<PyInnerFeatures>(m, "InnerFeatures", "Finishes the features of a layout's steps.")
      .def(py::init<std::vector<int64_t>, std::vector<int32_t>, std::vector<uint8_t>,
                    std::vector<int32_t>, size_t>(),
           py::kw_only(), py::arg("numel"), py::arg("group_of"), py::arg("group_clips"),
           py::arg("run_of"), py::arg("num_runs"))
      .def("accumulate", &PyInnerFeatures::Accumulate, py::arg("statistics"), py::arg("sums"));
  m.attr("NUM_ACCUMULATED") = static_cast<int>(kNumAccumulated);
}

void BindStep(py::module_& m) {
  py::class_<GroupOptions>(m, "GroupOptions", "Static options of a group, by the enums' values.")
      .def(py::init(&MakeGroup), py::kw_only(), py::arg("denominator"), py::arg("weight_decay"),
           py::arg("clip"), py::arg("trust"), py::arg("trust_ignores_vectors"),
           py::arg("radam_warmup"), py::arg("maximize"));
  py::class_<TensorSpec>(m, "TensorSpec", "Addresses of one tensor's arrays.")
      .def(py::init(&MakeTensor), py::kw_only(), py::arg("param"), py::arg("dtype"),
           py::arg("master"), py::arg("correction"), py::arg("size"), py::arg("moments"),
           py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("scales"), py::arg("grad_signs"),
           py::arg("group"), py::arg("is_vector"));
  py::class_<PyStep>(m, "Step", "One optimizer step over all tensors of all groups.")
      .def(
          py::init<std::vector<TensorSpec>, std::vector<GroupOptions>, std::vector<int32_t>, size_t,
                   uintptr_t, uintptr_t, uintptr_t, uintptr_t, bool, std::optional<uint64_t>>(),
          py::kw_only(), py::arg("tensors"), py::arg("groups"), py::arg("run_of"),
          py::arg("num_runs"), py::arg("scalars"), py::arg("group_state"), py::arg("tensor_state"),
          py::arg("skipped_steps"), py::arg("masks_nonfinite"), py::arg("rounding_seed"))
      .def("set_gradients", &PyStep::SetGradients, py::arg("addresses").noconvert(),
           py::arg("dtypes").noconvert())
      .def("run", &PyStep::Run, py::arg("statistics"), py::arg("num_threads"))
      .def("measure_gradients", &PyStep::MeasureGradients, py::arg("sums"), py::arg("num_threads"))
      .def("update_moments", &PyStep::UpdateMoments, py::arg("sums"), py::arg("partial"),
           py::arg("measures"), py::arg("num_threads"))
      .def("apply", &PyStep::Apply, py::arg("partial"), py::arg("num_threads"))
      .def_property_readonly("isa", &PyStep::isa);
  m.def("available_isas", &AvailableIsas, "Instruction sets of this processor, fastest first.");
  m.def(
      "active_isa", [] { return std::string(ActiveKernels().name); },
      "The instruction set of steps built now: LHOPT_CPU_ISA, or else the fastest.");
  m.attr("TABLE_COLUMNS") =
      py::make_tuple(static_cast<int>(kNumScalars), static_cast<int>(kNumGroupState),
                     static_cast<int>(kNumTensorState), static_cast<int>(kNumStatistics),
                     static_cast<int>(kNumGradientSums), static_cast<int>(kNumPartialSums));
}

}  // namespace
}  // namespace lhopt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Fused optimizer steps on the CPU.";
  lhopt::BindStep(m);
  lhopt::BindInnerFeatures(m);
  lhopt::BindPlacement(m);
  lhopt::BindPolicyRunner(m);
}
