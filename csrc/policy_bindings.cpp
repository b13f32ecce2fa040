// PolicyRunner in Python. Weights come as NumPy arrays; everything is checked before it is read.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "policy_runner.h"

namespace py = pybind11;

namespace lhopt {
namespace {

constexpr size_t kLargestHead = 64;

void Require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

Weights MakeWeights(const py::dict& arrays) {
  Weights weights;
  for (const auto& [key, value] : arrays) {
    const std::string name = py::cast<std::string>(key);
    Require(py::isinstance<py::array>(value), "weight " + name + " is not a NumPy array");
    const auto array = py::cast<py::array>(value);
    Require(array.dtype().is(py::dtype::of<float>()),
            "weight " + name + " has dtype " + py::cast<std::string>(py::str(array.dtype())) +
                ", expected float32");
    Require((array.flags() & py::array::c_style) != 0, "weight " + name + " is not contiguous");
    const auto* const data = static_cast<const float*>(array.data());
    Require(reinterpret_cast<uintptr_t>(data) % alignof(float) == 0,
            "weight " + name + " is not aligned to its element size");
    weights[name] = {data, {array.shape(), array.shape() + array.ndim()}};
  }
  return weights;
}

// One hyperparameter: whether it shifts the logit; log multipliers or logit shifts; bounds.
using ActionTuple = std::tuple<bool, std::vector<double>, double, double>;

ActionSpace MakeActionSpace(const std::vector<ActionTuple>& actions, bool has_registers) {
  Require(actions.size() == kNumHyperparameters, "there are " + std::to_string(actions.size()) +
                                                     " actions, expected " +
                                                     std::to_string(kNumHyperparameters));
  ActionSpace space;
  space.has_registers = has_registers;
  for (size_t i = 0; i < actions.size(); ++i) {
    const auto& [is_logit, shifts, low, high] = actions[i];
    const std::string name = "actions[" + std::to_string(i) + "]";
    Require(!shifts.empty() && shifts.size() <= kLargestHead,
            name + " has " + std::to_string(shifts.size()) + " choices, expected 1 to " +
                std::to_string(kLargestHead));
    Require(std::all_of(shifts.begin(), shifts.end(), [](double x) { return std::isfinite(x); }),
            name + " has a choice that is not finite");
    Require(low > 0.0 && low < high && std::isfinite(high) && (!is_logit || high < 1.0),
            name + " has bounds " + std::to_string(low) + " to " + std::to_string(high));
    space.bounds[i] = {is_logit, low, high};
    space.shifts[i] = shifts;
  }
  return space;
}

DecisionMode ParseMode(const std::string& mode) {
  if (mode == "mean") return DecisionMode::kMean;
  if (mode == "sample") return DecisionMode::kSample;
  if (mode == "argmax") return DecisionMode::kArgmax;
  throw py::value_error("mode is \"" + mode + "\", expected mean, sample or argmax");
}

template <class T>
py::array_t<T> Copy(const T* values, size_t size) {
  return py::array_t<T>(static_cast<py::ssize_t>(size), values);
}

// A runner that one thread uses at a time: the interpreter is free while it decides.
class PyPolicyRunner {
 public:
  PyPolicyRunner(const py::dict& weights, const std::vector<ActionTuple>& actions, bool registers,
                 const std::string& mode, uint64_t seed)
      : runner_(MakeWeights(weights), MakeActionSpace(actions, registers), ParseMode(mode), seed) {}

  py::tuple Decide(const std::array<double, kNumInnerFeatures>& inner, double train_loss,
                   std::optional<double> eval_loss, double progress, double outer_steps,
                   double path_length, double param_norm, const Hyperparameters& hyperparameters,
                   const Hyperparameters& start_hyperparameters,
                   const std::array<double, kNumRegisters>& register_losses,
                   const std::array<double, kNumRegisters>& register_progress) {
    Require(progress >= 0.0 && progress <= 1.0,
            "progress is " + std::to_string(progress) + ", expected 0 to 1");
    Require(outer_steps >= 1.0 && std::isfinite(outer_steps),
            "outer_steps is " + std::to_string(outer_steps) + ", expected 1 or more");
    RequireIdle();
    running_ = true;
    {
      const py::gil_scoped_release release;
      runner_.Decide({inner, train_loss, eval_loss.value_or(0.0), eval_loss.has_value(), progress,
                      outer_steps, path_length, param_norm, hyperparameters, start_hyperparameters,
                      register_losses, register_progress});
    }
    running_ = false;
    return py::make_tuple(Copy(runner_.hyperparameters().data(), kNumHyperparameters),
                          Copy(runner_.shifts().data(), kNumHyperparameters),
                          runner_.register_choice(), Copy(runner_.features(), kNumPolicyFeatures),
                          Copy(runner_.probabilities().data(), runner_.probabilities().size()));
  }

  py::array_t<double> GetState() const {
    RequireIdle();
    const std::vector<double> state = runner_.GetState();
    return Copy(state.data(), state.size());
  }

  void SetState(const std::vector<double>& state) {
    RequireIdle();
    runner_.SetState(state);
  }

  std::string isa() const { return runner_.isa(); }

 private:
  void RequireIdle() const {
    if (running_) throw std::runtime_error("this run is already deciding in another thread");
  }

  PolicyRunner runner_;
  bool running_ = false;  // guarded by the GIL
};

}  // namespace

void BindPolicyRunner(py::module_& m) {
  py::class_<PyPolicyRunner>(m, "PolicyRunner", "A policy network at work on one training run.")
      .def(py::init<const py::dict&, const std::vector<ActionTuple>&, bool, const std::string&,
                    uint64_t>(),
           py::kw_only(), py::arg("weights"), py::arg("actions"), py::arg("registers"),
           py::arg("mode"), py::arg("seed"))
      .def("decide", &PyPolicyRunner::Decide, py::arg("inner"), py::arg("train_loss"),
           py::arg("eval_loss"), py::arg("progress"), py::arg("outer_steps"),
           py::arg("path_length"), py::arg("param_norm"), py::arg("hyperparameters"),
           py::arg("start_hyperparameters"), py::arg("register_losses"),
           py::arg("register_progress"))
      .def("get_state", &PyPolicyRunner::GetState)
      .def("set_state", &PyPolicyRunner::SetState, py::arg("state"))
      .def_property_readonly("isa", &PyPolicyRunner::isa);
  m.def("counter_uniform", &CounterUniform, py::arg("seed"), py::arg("step"), py::arg("head"),
        "A uniform number in [0, 1), a pure function of its key.");
  m.attr("NUM_POLICY_FEATURES") = kNumPolicyFeatures;
}

}  // namespace lhopt
