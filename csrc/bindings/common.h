// Stable-ABI tensors to raw pointers, torch's thread pool as a ParallelFor, and the checks that guard memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "bindings/results.h"
#include "core/dtype.h"
#include "core/error.h"
#include "cpu/team.h"

namespace fastlm::bindings {

inline void parallel_for(int64_t begin, int64_t end, cpu::ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { body(from, to, context); });
}

inline int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

inline void check(bool holds, const char* message) {
  if (!holds) fail(message);
}

// An input is checked against what the kernel will read. It keeps a wrong call from reading past the end; fastlm/ops
// then says it again by the argument's name.
inline void check(const Tensor& tensor, const char* name, const Shape& shape, ScalarType dtype) {
  const auto named = [&](const char* text) { return name + std::string(": ") + text; };
  if (tensor.dim() != shape.count) fail(named("wrong number of dimensions"));
  for (int64_t i = 0; i < shape.count; ++i)
    if (tensor.size(i) != shape.sizes[i])
      fail(named("expected size ") + std::to_string(shape.sizes[i]) + " in dimension " + std::to_string(i) + ", got " +
           std::to_string(tensor.size(i)));
  if (tensor.scalar_type() != dtype) fail(named("wrong dtype"));
  if (!tensor.is_cpu()) fail(named("expected a CPU tensor"));
}

// The dense form of an input, checked.
inline Tensor dense(const Tensor& tensor, const char* name, const Shape& shape, ScalarType dtype) {
  check(tensor, name, shape, dtype);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor, const char* name, const Shape& shape, ScalarType dtype) {
  if (!tensor) return std::nullopt;
  return dense(*tensor, name, shape, dtype);
}

template <class T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* write(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Calls run with a value of the element type.
template <class Run>
void dispatch(ScalarType dtype, const char* op, const Run& run) {
  if (dtype == ScalarType::Float) return run(float());
  if (dtype == ScalarType::Double) return run(double());
  fail(std::string(op) + ": expected float32 or float64");
}

// The element type of the arithmetic on tensors of `dtype`.
inline ScalarType compute_type(ScalarType dtype) { return dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype; }

// dispatch() with bfloat16 as a third.
template <class Run>
void dispatch_with_bfloat16(ScalarType dtype, const char* op, const Run& run) {
  if (dtype == ScalarType::BFloat16) return run(BFloat16());
  dispatch(dtype, op, run);
}

}  // namespace fastlm::bindings
