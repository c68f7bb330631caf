#include "cpu/gelu.h"

#include "bindings/common.h"

namespace fastlm::bindings {
namespace {

Tensor gelu(const Tensor& x_in, const OptionalTensor& grad_output) {
  check(x_in.is_cpu(), "x: expected a CPU tensor");
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const Tensor result = empty_as(x);
  OptionalTensor grad;
  if (grad_output) {
    check(grad_output->scalar_type() == x.scalar_type() && grad_output->numel() == x.numel(),
          "grad_output: expected dtype and size of x");
    grad = grad_output->is_contiguous() ? *grad_output : torch::stable::contiguous(*grad_output);
  }
  dispatch_with_bfloat16(x.scalar_type(), "gelu", [&](auto zero) {
    using S = decltype(zero);
    auto* to = static_cast<S*>(result.mutable_data_ptr());
    const auto* from = static_cast<const S*>(x.const_data_ptr());
    if (x.numel()) cpu::gelu(GeluParams<S>{x.numel(), from, read<S>(grad), to}, max_threads(), parallel_for);
  });
  return result;
}

Tensor gelu_forward(const Tensor& x) { return gelu(x, std::nullopt); }
Tensor gelu_backward(const Tensor& grad_output, const Tensor& x) { return gelu(x, grad_output); }

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("gelu_forward", TORCH_BOX(&fastlm::bindings::gelu_forward));
  library.impl("gelu_backward", TORCH_BOX(&fastlm::bindings::gelu_backward));
}
