#include "cpu/dropout.h"

#include "bindings/common.h"

namespace fastlm::bindings {
namespace {

Tensor dropout(const Tensor& x_in, const Tensor& seed_in, double probability) {
  check(x_in.is_cpu(), "x: expected a CPU tensor");
  check(probability >= 0 && probability <= 1, "probability: expected a number from 0 to 1");
  const Tensor seed = dense(seed_in, "seed", {}, ScalarType::Long);
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const Tensor result = empty_as(x);
  dispatch_with_bfloat16(x.scalar_type(), "dropout", [&](auto zero) {
    using S = decltype(zero);
    auto* to = static_cast<S*>(result.mutable_data_ptr());
    const auto* from = static_cast<const S*>(x.const_data_ptr());
    const DropoutParams<S> p{x.numel(), from, to, probability, *static_cast<const int64_t*>(seed.const_data_ptr())};
    if (p.n) cpu::dropout(p, max_threads(), parallel_for);
  });
  return result;
}

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) { library.impl("dropout", TORCH_BOX(&fastlm::bindings::dropout)); }
