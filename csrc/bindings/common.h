// Stable-ABI tensors to raw pointers, torch's thread pool as a ParallelFor, and the checks that guard memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/team.h"

namespace fastlm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void parallel_for(int64_t begin, int64_t end, cpu::ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { body(from, to, context); });
}

inline int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument("fastlm: " + message); }

inline void check(bool holds, const char* message) {
  if (!holds) fail(message);
}

// The dense form of an input, checked against what the kernel will read. It keeps a
// wrong call from reading past the end; fastlm/ops then says it again by the argument's name.
inline Tensor dense(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const auto named = [&](const char* text) { return name + std::string(": ") + text; };
  if (tensor.dim() != static_cast<int64_t>(shape.size())) fail(named("wrong number of dimensions"));
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (tensor.size(i) != size)
      fail(named("expected size ") + std::to_string(size) + " in dimension " + std::to_string(i) + ", got " +
           std::to_string(tensor.size(i)));
    ++i;
  }
  if (tensor.scalar_type() != dtype) fail(named("dtype differs from that of x"));
  if (!tensor.is_cpu()) fail(named("expected a CPU tensor"));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor, const char* name, std::initializer_list<int64_t> shape,
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
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape) {
  constexpr size_t kMaxDims = 3;
  int64_t strides[kMaxDims], stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape.begin()[i], 1)) strides[i] = stride;
  int32_t dtype = 0, device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                                         dtype, device_type, 0, &handle));
  return Tensor(handle);
}

// A result that may not be asked for: then an empty tensor stands in its place.
inline OptionalTensor empty_if(bool wanted, const Tensor& like, std::initializer_list<int64_t> shape) {
  if (!wanted) return std::nullopt;
  return empty(like, shape);
}

inline Tensor or_empty(const OptionalTensor& tensor, const Tensor& like) { return tensor ? *tensor : empty(like, {0}); }

// Calls run(float()) or run(double()) by dtype.
template <class Run>
void dispatch(ScalarType dtype, const char* op, const Run& run) {
  if (dtype == ScalarType::Float) return run(float());
  if (dtype == ScalarType::Double) return run(double());
  fail(std::string(op) + ": expected float32 or float64");
}

}  // namespace fastlm::bindings
