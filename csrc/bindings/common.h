// Stable-ABI tensors to raw pointers, torch's thread pool as a ParallelFor, and the checks that guard memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "core/dtype.h"
#include "core/error.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace fastlm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void parallel_for(int64_t begin, int64_t end, cpu::ParallelBody body, void* context) {
  torch::stable::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) { body(from, to, context); });
}

inline int max_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

inline void check(bool holds, const char* message) {
  if (!holds) fail(message);
}

// The sizes of a tensor of at most four dimensions.
struct Shape {
  int64_t sizes[4], count = 0;
  Shape(std::initializer_list<int64_t> given) {
    for (const int64_t size : given) sizes[count++] = size;
  }
};

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

constexpr int64_t kHugeTensor = 2 * cpu::kHugePage;

// Straight to torch's allocator: a small call would feel the dispatcher's microseconds.
inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, 0,
      &handle));
  Tensor tensor(handle);
  const int64_t bytes = tensor.numel() * tensor.element_size();
  // The allocator gives large tensors back to the system, so their pages come anew with every call: 512 times fewer.
  if (bytes >= kHugeTensor) cpu::ask_for_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  int64_t strides[4], stride = 1;
  for (int64_t i = shape.count; i-- > 0; stride *= std::max<int64_t>(shape.sizes[i], 1)) strides[i] = stride;
  return empty_strided(like, shape.count, shape.sizes, strides, dtype);
}
// As a dense tensor of any number of dimensions.
inline Tensor empty_as(const Tensor& dense) {
  return empty_strided(dense, dense.dim(), dense.sizes().data(), dense.strides().data(), dense.scalar_type());
}
inline Tensor empty(const Tensor& like, const Shape& shape) { return empty(like, shape, like.scalar_type()); }

// A result that may not be asked for: then an empty tensor stands in its place.
inline OptionalTensor empty_if(bool wanted, const Tensor& like, const Shape& shape, ScalarType dtype) {
  if (!wanted) return std::nullopt;
  return empty(like, shape, dtype);
}
inline OptionalTensor empty_if(bool wanted, const Tensor& like, const Shape& shape) {
  return empty_if(wanted, like, shape, like.scalar_type());
}

inline Tensor or_empty(const OptionalTensor& tensor, const Tensor& like) { return tensor ? *tensor : empty(like, {0}); }

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
