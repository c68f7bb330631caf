#include "cpu/cross_entropy.h"

#include <vector>

#include "bindings/common.h"
#include "core/params.h"

namespace fastlm::bindings {
namespace {

// The tensors of a call, checked, and the rows that count.
struct CrossEntropyCall {
  const ScalarType dtype;
  int64_t rows, vocab, dim;
  Tensor hidden, weight, target;
  OptionalTensor bias;
  std::vector<int64_t> live;

  CrossEntropyCall(const Tensor& hidden_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                   const Tensor& target_in, int64_t ignore_index)
      : dtype(hidden_in.scalar_type()) {
    check(hidden_in.dim() == 2, "hidden: expected 2 dimensions (R, D)");
    check(weight_in.dim() == 2, "weight: expected 2 dimensions (V, D)");
    rows = hidden_in.size(0), dim = hidden_in.size(1), vocab = weight_in.size(0);
    check(vocab > 0, "weight: expected at least one row (V >= 1)");
    hidden = dense(hidden_in, "hidden", {rows, dim}, dtype);
    weight = dense(weight_in, "weight", {vocab, dim}, dtype);
    bias = dense(bias_in, "bias", {vocab}, dtype);
    target = dense(target_in, "target", {rows}, ScalarType::Long);
    const auto* classes = static_cast<const int64_t*>(target.const_data_ptr());
    for (int64_t r = 0; r < rows; ++r) {
      if (classes[r] == ignore_index) continue;
      if (classes[r] < 0 || classes[r] >= vocab)
        fail("target: expected class indices from 0 to " + std::to_string(vocab - 1) + ", or ignore_index = " +
             std::to_string(ignore_index) + ", got " + std::to_string(classes[r]) + " at index " + std::to_string(r));
      live.push_back(r);
    }
  }

  template <class S>
  CrossEntropyParams<S> params(double smoothing, const Tensor& statistics, const OptionalTensor& grad_hidden,
                               const OptionalTensor& grad_weight, const OptionalTensor& grad_bias) const {
    using T = Compute<S>;
    CrossEntropyParams<S> p{};
    p.rows = rows, p.vocab = vocab, p.dim = dim;
    p.hidden = read<S>(hidden), p.weight = read<S>(weight), p.bias = read<S>(bias);
    p.target = read<int64_t>(target);
    p.live = live.data(), p.live_rows = static_cast<int64_t>(live.size());
    p.smoothing = static_cast<T>(smoothing);
    p.statistics = static_cast<T*>(const_cast<void*>(statistics.const_data_ptr()));
    p.grad_hidden = write<S>(grad_hidden), p.grad_weight = write<S>(grad_weight), p.grad_bias = write<S>(grad_bias);
    return p;
  }
};

enum Reduction { kNone, kMean, kSum };

// The sum in row order, by no thread count changed; hundreds of roundings of a double would show in a double.
template <class T>
T reduced(const std::vector<T>& losses, const std::vector<int64_t>& live, bool mean) {
  long double sum = 0;
  for (const int64_t row : live) sum += losses[row];
  return static_cast<T>(mean ? sum / static_cast<long double>(live.size()) : sum);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& target, int64_t ignore_index,
    double smoothing, int64_t reduction, bool need_hidden, bool need_weight, bool need_bias) {
  const CrossEntropyCall call(hidden, weight, bias, target, ignore_index);
  const ScalarType compute = compute_type(call.dtype);
  const Tensor loss = reduction == kNone ? empty(hidden, {call.rows}, compute) : empty(hidden, {}, compute);
  const Tensor statistics = empty(hidden, {2, call.rows}, compute);
  const auto grad_hidden = empty_if(need_hidden, hidden, {call.rows, call.dim});
  const auto grad_weight = empty_if(need_weight, hidden, {call.vocab, call.dim});
  const auto grad_bias = empty_if(need_bias, hidden, {call.vocab});
  dispatch_with_bfloat16(call.dtype, "linear_cross_entropy", [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    std::vector<T> losses(reduction == kNone ? 0 : call.rows);
    auto p = call.params<S>(smoothing, statistics, grad_hidden, grad_weight, grad_bias);
    p.row_weight = reduction == kMean ? T(1) / static_cast<T>(p.live_rows) : T(1);
    p.losses = reduction == kNone ? write<T>(loss) : losses.data();
    cpu::cross_entropy(p, max_threads(), parallel_for);
    if (reduction != kNone) *write<T>(loss) = reduced(losses, call.live, reduction == kMean);
  });
  return {loss, statistics, or_empty(grad_hidden, hidden), or_empty(grad_weight, hidden), or_empty(grad_bias, hidden)};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad_losses_in, const Tensor& hidden,
                                                                 const Tensor& weight, const OptionalTensor& bias,
                                                                 const Tensor& target, const Tensor& statistics_in,
                                                                 int64_t ignore_index, double smoothing,
                                                                 bool need_hidden, bool need_weight, bool need_bias) {
  const CrossEntropyCall call(hidden, weight, bias, target, ignore_index);
  const ScalarType compute = compute_type(call.dtype);
  const Tensor grad_losses = dense(grad_losses_in, "grad_losses", {call.rows}, compute);
  const Tensor statistics = dense(statistics_in, "statistics", {2, call.rows}, compute);
  const auto grad_hidden = empty_if(need_hidden, hidden, {call.rows, call.dim});
  const auto grad_weight = empty_if(need_weight, hidden, {call.vocab, call.dim});
  const auto grad_bias = empty_if(need_bias, hidden, {call.vocab});
  dispatch_with_bfloat16(call.dtype, "linear_cross_entropy", [&](auto zero) {
    using S = decltype(zero);
    auto p = call.params<S>(smoothing, statistics, grad_hidden, grad_weight, grad_bias);
    p.row_weights = read<Compute<S>>(grad_losses);
    cpu::cross_entropy(p, max_threads(), parallel_for);
  });
  return {or_empty(grad_hidden, hidden), or_empty(grad_weight, hidden), or_empty(grad_bias, hidden)};
}

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("linear_cross_entropy_forward", TORCH_BOX(&fastlm::bindings::linear_cross_entropy_forward));
  library.impl("linear_cross_entropy_backward", TORCH_BOX(&fastlm::bindings::linear_cross_entropy_backward));
}
