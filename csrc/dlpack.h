// What is read of DLPack 1.3, the C interface through which torch says where a tensor is: declared
// anew after dlpack/dlpack.h of https://github.com/dmlc/dlpack (Apache License 2.0, Copyright (c)
// 2017 by Contributors). Names, order and types of the fields are that header's.
#pragma once

#include <cstdint>

namespace lhopt::dlpack {

constexpr uint32_t kMajorVersion = 1;  // another one may lay out everything below another way
constexpr const char* kCapsuleName = "dlpack_exchange_api";

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

enum DataTypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim], in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the same for an older version, or null
};

using AnyFunction = void (*)();

struct Exchange {
  ExchangeHeader header;
  AnyFunction managed_tensor_allocator;
  AnyFunction managed_tensor_from_py_object;
  AnyFunction managed_tensor_to_py_object;
  // Fills in `out`, which owns nothing, for a tensor; -1 with a Python exception set if it cannot.
  // May be null.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  AnyFunction current_work_stream;
};

}  // namespace lhopt::dlpack
