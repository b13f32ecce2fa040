// Where an optimizer's tensors are, looked up before every step. torch is asked through DLPack's
// table of C functions, which takes tens of nanoseconds a tensor and no torch headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "kernels.h"

namespace py = pybind11;

namespace lhopt {
namespace {

constexpr int8_t kOther = -2;  // of a dtype that has no code
constexpr int64_t kAnyStride = INT64_MIN;

// The table in torch's capsule; null where there is none of a version that is known.
const dlpack::Exchange* FindExchange(const py::object& capsule) {
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName) == 0) return nullptr;
  void* const table = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(table);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) {
    header = header->previous;
  }
  const auto* const exchange = reinterpret_cast<const dlpack::Exchange*>(header);
  const bool is_whole = exchange != nullptr && exchange->tensor_from_py_object != nullptr;
  return is_whole ? exchange : nullptr;
}

int8_t CodeOf(const dlpack::DataType& dtype) {
  const auto is = [&](uint8_t code, uint8_t bits) {
    return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
  };
  if (is(dlpack::kFloat, 32)) return static_cast<int8_t>(DType::kFloat32);
  if (is(dlpack::kBfloat, 16)) return static_cast<int8_t>(DType::kBFloat16);
  if (is(dlpack::kFloat, 16)) return static_cast<int8_t>(DType::kFloat16);
  return kOther;
}

int64_t AddressOf(const dlpack::Tensor& tensor) {
  return reinterpret_cast<int64_t>(tensor.data) + static_cast<int64_t>(tensor.byte_offset);
}

// What was found; values as in placement.py.
enum Sight : int {
  kUnbound,  // other parameters or moments than those that are bound, or they have moved
  kUnfit,    // a gradient is not to be read as it is
  kReady,
};

class Placement {
 public:
  // `types`: torch's own, of which nothing is unsaid by the exchange. `params`: of these types.
  // `views`: dense tensors in place of `params`, whose form gradients are to have.
  //
  // Of what it is given it keeps the types alone: Python's garbage collector does not see in here,
  // and a parameter may hold the optimizer, by an attribute.
  Placement(const py::object& capsule, py::tuple types, const py::list& params,
            const py::list& views)
      : exchange_(FindExchange(capsule)),
        known_types_(std::move(types)),
        addresses_(static_cast<py::ssize_t>(params.size())),
        dtypes_(static_cast<py::ssize_t>(params.size())),
        address_of_(addresses_.mutable_data()),
        dtype_of_(dtypes_.mutable_data()) {
    if (exchange_ == nullptr) throw py::value_error("capsule holds no DLPack exchange, version 1");
    CheckLength(views, params.size(), "views");
    for (const py::handle type : known_types_) AddType(type);
    for (size_t i = 0; i < params.size(); ++i) {
      const dlpack::Tensor param = Described(Item(params, i));
      const dlpack::Tensor view = Described(Item(views, i));
      if (view.ndim != param.ndim) throw py::value_error("a view is not of its parameter's shape");
      bound_.push_back(
          {AddressOf(param), param.dtype, param.device, param.ndim, dimensions_.size()});
      dimensions_.insert(dimensions_.end(), param.shape, param.shape + param.ndim);
      AddStrides(param);
      AddStrides(view);
    }
    addresses_.attr("flags").attr("writeable") = false;
    dtypes_.attr("flags").attr("writeable") = false;
  }

  // Looks at the parameters of param groups: whether they are `params`, where they were, and their
  // states, dicts, hold `exp_avgs`. Unless they are unbound, their gradients are put into `grads`;
  // if they are ready, `addresses` and `dtypes` say where and what these are.
  int Look(const py::list& groups, const py::list& params, const py::list& states,
           const py::list& exp_avgs, py::list grads) {
    CheckLength(params, bound_.size(), "params");
    CheckLength(states, bound_.size(), "states");
    CheckLength(exp_avgs, bound_.size(), "exp_avgs");
    CheckLength(grads, bound_.size(), "grads");
    size_t next = 0;
    bool are_fit = true;
    for (const py::handle group : groups) {
      const auto members = py::reinterpret_steal<py::object>(
          PySequence_Fast(py::object(group[params_key_]).ptr(), "params must be a list"));
      if (!members) throw py::error_already_set();
      for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(members.ptr()); ++i) {
        const auto param =
            py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(members.ptr(), i));
        py::object grad = GradientOf(param);
        if (next < bound_.size() && param.ptr() == Item(params, next)) {
          if (!IsWhereItWas(next, param) || !Holds(Item(states, next), Item(exp_avgs, next))) {
            return kUnbound;
          }
          are_fit &= Take(next++, std::move(grad), grads);
        } else if (!grad.is_none()) {
          return kUnbound;
        }
      }
    }
    if (next < bound_.size()) return kUnbound;
    return are_fit ? kReady : kUnfit;
  }

  py::array addresses() const { return addresses_; }
  py::array dtypes() const { return dtypes_; }

 private:
  struct Bound {
    int64_t address;
    dlpack::DataType dtype;
    dlpack::Device device;
    int32_t ndim;
    size_t dimensions;  // place of its shape, its strides and its view's among all dimensions
  };

  // Also finds the way to a tensor's gradient, once for all tensors.
  void AddType(const py::handle type) {
    if (PyType_Check(type.ptr()) == 0) throw py::type_error("types must be types");
    py::object getter = type.attr(grad_name_);
    if (Py_TYPE(getter.ptr())->tp_descr_get == nullptr ||
        (grad_getter_ && !getter.is(grad_getter_))) {
      throw py::type_error("types must have one and the same attribute grad");
    }
    grad_getter_ = std::move(getter);
    types_.push_back(reinterpret_cast<const PyTypeObject*>(type.ptr()));
  }

  enum Strides : int { kParamStrides = 1, kViewStrides = 2 };

  // Strides along a single element do not matter, nor do those of an empty tensor.
  void AddStrides(const dlpack::Tensor& tensor) {
    const bool is_empty = std::count(tensor.shape, tensor.shape + tensor.ndim, 0) > 0;
    for (int32_t i = 0; i < tensor.ndim; ++i) {
      const bool is_free = is_empty || tensor.shape[i] == 1;
      dimensions_.push_back(is_free ? kAnyStride : tensor.strides[i]);
    }
  }

  // Whether it is on the device of a bound parameter, of its shape, and in that memory order.
  bool Fits(const dlpack::Tensor& tensor, const Bound& bound, Strides which) const {
    if (tensor.device.type != bound.device.type || tensor.device.id != bound.device.id ||
        tensor.ndim != bound.ndim) {
      return false;
    }
    const int64_t* const shape = dimensions_.data() + bound.dimensions;
    const int64_t* const strides = shape + which * bound.ndim;
    for (int32_t i = 0; i < bound.ndim; ++i) {
      if (tensor.shape[i] != shape[i]) return false;
      if (strides[i] != kAnyStride && tensor.strides[i] != strides[i]) return false;
    }
    return true;
  }

  static py::str Interned(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }

  static void CheckLength(const py::list& list, size_t count, const char* name) {
    if (list.size() == count) return;
    throw py::value_error(std::string(name) + " has " + std::to_string(list.size()) +
                          " entries for " + std::to_string(count) + " parameters");
  }

  // Of a list whose length has been checked; nobody else has hold of it.
  static PyObject* Item(const py::list& list, size_t index) {
    return PyList_GET_ITEM(list.ptr(), static_cast<py::ssize_t>(index));
  }

  bool IsWhereItWas(size_t index, const py::object& tensor) const {
    const Bound& bound = bound_[index];
    dlpack::Tensor param;
    return Describe(tensor.ptr(), &param) && AddressOf(param) == bound.address &&
           param.dtype.code == bound.dtype.code && param.dtype.bits == bound.dtype.bits &&
           Fits(param, bound, kParamStrides);
  }

  bool Holds(PyObject* state, PyObject* exp_avg) const {
    if (PyDict_Check(state) == 0) throw py::type_error("states must be dicts");
    PyObject* const moment = PyDict_GetItemWithError(state, exp_avg_key_.ptr());
    if (moment == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return moment == exp_avg;
  }

  py::object GradientOf(const py::object& param) const {
    PyObject* const getter = grad_getter_.ptr();
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(param.ptr()));
    auto grad = py::reinterpret_steal<py::object>(
        IsPlain(param.ptr()) ? Py_TYPE(getter)->tp_descr_get(getter, param.ptr(), type)
                             : PyObject_GetAttr(param.ptr(), grad_name_.ptr()));
    if (!grad) throw py::error_already_set();
    return grad;
  }

  bool IsPlain(PyObject* tensor) const {
    return std::find(types_.begin(), types_.end(), Py_TYPE(tensor)) != types_.end();
  }

  // Puts a gradient into `grads`; false if it is there and not to be read as it is.
  bool Take(size_t index, py::object grad, py::list& grads) {
    dlpack::Tensor found{};
    const bool is_missing = grad.is_none();
    const bool is_fit = !is_missing && Describe(grad.ptr(), &found) &&
                        CodeOf(found.dtype) != kOther && Fits(found, bound_[index], kViewStrides);
    address_of_[index] = is_fit ? AddressOf(found) : 0;
    dtype_of_[index] = is_fit ? CodeOf(found.dtype) : kNoGradient;
    const auto place = static_cast<py::ssize_t>(index);
    if (PyList_SetItem(grads.ptr(), place, grad.release().ptr()) < 0) throw py::error_already_set();
    return is_fit || is_missing;
  }

  // Whether torch could say where a tensor is, and nothing is missing from what it says.
  bool Describe(PyObject* tensor, dlpack::Tensor* found) const {
    if (!IsPlain(tensor)) return false;
    if (exchange_->tensor_from_py_object(tensor, found) == 0) return true;
    PyErr_Clear();
    return false;
  }

  dlpack::Tensor Described(PyObject* tensor) const {
    dlpack::Tensor found;
    if (!Describe(tensor, &found)) throw py::type_error("not a plain dense tensor");
    return found;
  }

  const dlpack::Exchange* exchange_;
  py::tuple known_types_;
  std::vector<const PyTypeObject*> types_;  // the same
  py::array_t<int64_t> addresses_;
  py::array_t<int8_t> dtypes_;
  int64_t* address_of_;
  int8_t* dtype_of_;
  std::vector<Bound> bound_;
  std::vector<int64_t> dimensions_;
  py::object grad_getter_;
  py::str params_key_ = Interned("params"), exp_avg_key_ = Interned("exp_avg");
  py::str grad_name_ = Interned("grad");
};

}  // namespace

void BindPlacement(py::module_& m) {
  py::class_<Placement>(m, "Placement", "Looks at an optimizer's tensors before every step.")
      .def(py::init<const py::object&, py::tuple, const py::list&, const py::list&>(),
           py::kw_only(), py::arg("capsule"), py::arg("types"), py::arg("params"), py::arg("views"))
      .def("look", &Placement::Look, py::arg("groups"), py::arg("params"), py::arg("states"),
           py::arg("exp_avgs"), py::arg("grads"))
      .def_property_readonly("addresses", &Placement::addresses)
      .def_property_readonly("dtypes", &Placement::dtypes);
  m.def(
      "knows_exchange", [](const py::object& x) { return FindExchange(x) != nullptr; },
      py::arg("capsule"), "Whether it holds a DLPack exchange that a Placement can use.");
}

}  // namespace lhopt
