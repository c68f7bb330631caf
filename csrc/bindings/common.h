// Stable-ABI tensors to raw pointers, torch's thread pool as a ParallelFor, and the checks that guard memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/team.h"

namespace fastlm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void parallel_for(int64_t begin, int64_t end, cpu::ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { body(from, to, context); });
}

inline int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

inline void check(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("fastlm: " + message);
}

// The dense form of an input, checked against what the kernel will read. It keeps a
// wrong call from reading past the end; fastlm/ops then says it again by the argument's name.
inline Tensor dense(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape, ScalarType dtype) {
  check(tensor.dim() == static_cast<int64_t>(shape.size()), std::string(name) + ": wrong number of dimensions");
  for (size_t i = 0; i < shape.size(); ++i)
    check(tensor.size(i) == shape[i], std::string(name) + ": expected size " + std::to_string(shape[i]) +
                                          " in dimension " + std::to_string(i) + ", got " +
                                          std::to_string(tensor.size(i)));
  check(tensor.scalar_type() == dtype, std::string(name) + ": dtype differs from that of x");
  check(tensor.is_cpu(), std::string(name) + ": expected a CPU tensor");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor, const char* name, const std::vector<int64_t>& shape,
                            ScalarType dtype) {
  if (!tensor) return std::nullopt;
  return dense(*tensor, name, shape, dtype);
}

template <class T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? tensor->template const_data_ptr<T>() : nullptr;
}

template <class T>
T* write(const OptionalTensor& tensor) {
  return tensor ? tensor->template mutable_data_ptr<T>() : nullptr;
}

// Straight to torch's allocator: a small call would feel the dispatcher's microseconds.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1)) strides[i] = stride;
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype, device_type, 0, &handle));
  return Tensor(handle);
}

// A result that may not be asked for: then an empty tensor stands in its place.
inline OptionalTensor empty_if(bool wanted, const Tensor& like, std::vector<int64_t> shape) {
  if (!wanted) return std::nullopt;
  return empty(like, std::move(shape));
}

inline Tensor or_empty(const OptionalTensor& tensor, const Tensor& like) { return tensor ? *tensor : empty(like, {0}); }

// Calls run(float()) or run(double()) by dtype.
template <class Run>
void dispatch(ScalarType dtype, const char* op, const Run& run) {
  if (dtype == ScalarType::Float) return run(float());
  if (dtype == ScalarType::Double) return run(double());
  check(false, std::string(op) + ": expected float32 or float64");
}

}  // namespace fastlm::bindings
