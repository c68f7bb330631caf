// New tensors for results, contents void, and where their memory comes from.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "cpu/pages.h"

namespace fastlm::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The sizes of a tensor of at most four dimensions.
struct Shape {
  int64_t sizes[4], count = 0;
  Shape(std::initializer_list<int64_t> given) {
    for (const int64_t size : given) sizes[count++] = size;
  }
};

// What a new tensor is made of.
struct Layout {
  int64_t dims;
  const int64_t *sizes, *strides;
  int32_t dtype, device_type;  // as the C interface has them

  int64_t bytes() const {
    int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    for (int64_t i = 0; i < dims; ++i) bytes *= sizes[i];
    return bytes;
  }
};

// From torch's allocator, without the dispatcher: a small call would feel its microseconds.
inline Tensor empty_from_torch(const Layout& layout) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(layout.dims, layout.sizes, layout.strides, layout.dtype,
                                                         layout.device_type, 0, &handle));
  return Tensor(handle);
}

// From the blocks kept for large results, if there is so much memory.
inline OptionalTensor empty_from_pages(const Layout& layout) {
  const cpu::Pages pages = cpu::take_pages(layout.bytes());
  if (!pages.base) return std::nullopt;
  const auto give = [](void* base, void* bytes) {
    cpu::give_pages({static_cast<char*>(base), static_cast<int64_t>(reinterpret_cast<intptr_t>(bytes))});
  };
  void* const bytes = reinterpret_cast<void*>(static_cast<intptr_t>(pages.bytes));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(pages.base, layout.dims, layout.sizes, layout.strides, 0, layout.dtype,
                                                layout.device_type, -1, &handle, aoti_torch_layout_strided(), nullptr,
                                                0, give, bytes));
  return Tensor(handle);
}

// glibc keeps what it got for smaller tensors, and gives larger ones back to the system with every call.
constexpr int64_t kLargeResult = 32 << 20;
constexpr int64_t kHugeTensor = 2 * cpu::kHugePage;

inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides,
                            ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const Layout layout{dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                      device_type};
  const int64_t bytes = layout.bytes();
  if (bytes > kLargeResult)
    if (const OptionalTensor tensor = empty_from_pages(layout)) return *tensor;
  // Where there was no memory, torch says how much it was.
  Tensor tensor = empty_from_torch(layout);
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

}  // namespace fastlm::bindings
