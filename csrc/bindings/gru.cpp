#include "bindings/recurrent.h"
#include "core/gates.h"
#include "cpu/recurrent.h"

namespace fastlm::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x_in, const OptionalTensor& h0_in, const Tensor& w_ih_in,
                                               const Tensor& w_hh_in, const OptionalTensor& b_ih_in,
                                               const OptionalTensor& b_hh_in, const OptionalTensor& lengths,
                                               const OptionalTensor& batch_sizes, const OptionalTensor& reset_mask,
                                               bool reverse, bool save) {
  const RecurrentCall call(x_in, w_hh_in, kGruGates, lengths, batch_sizes, reset_mask);
  const Tensor x = dense(x_in, "x", call.rows(call.input_size), call.dtype);
  const auto h0 = dense(h0_in, "h0", call.states_as(h0_in), call.dtype);
  const Tensor w_ih = dense(w_ih_in, "w_ih", {call.gates, call.input_size}, call.dtype);
  const Tensor w_hh = dense(w_hh_in, "w_hh", {call.gates, call.hidden}, call.dtype);
  const auto b_ih = dense(b_ih_in, "b_ih", {call.gates}, call.dtype);
  const auto b_hh = dense(b_hh_in, "b_hh", {call.gates}, call.dtype);
  const Tensor output = empty(x, call.rows(call.hidden)), h_n = empty(x, call.states());
  const auto reserve = empty_if(save, x, call.rows(kGruReserve * call.hidden), compute_type(call.dtype));
  dispatch_with_bfloat16(call.dtype, "gru_forward", [&](auto zero) {
    using S = decltype(zero);
    RecurrentForwardParams<S> p{};
    call.fill(p);
    p.x = read<S>(x), p.h0 = read<S>(h0), p.w_ih = read<S>(w_ih), p.w_hh = read<S>(w_hh);
    p.b_ih = read<S>(b_ih), p.b_hh = read<S>(b_hh), p.reverse = reverse;
    p.output = write<S>(output), p.h_n = write<S>(h_n), p.reserve = write<Compute<S>>(reserve);
    cpu::gru_forward(p, max_threads(), parallel_for);
  });
  return {output, h_n, or_empty(reserve, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_output_in, const OptionalTensor& grad_h_n_in, const Tensor& x_in,
    const OptionalTensor& state, const Tensor& w_ih_in, const Tensor& w_hh_in, const OptionalTensor& lengths,
    const OptionalTensor& batch_sizes, const OptionalTensor& reset_mask, const Tensor& reserve_in, bool reverse,
    bool need_x, bool need_weights, bool need_bias) {
  const RecurrentCall call(x_in, w_hh_in, kGruGates, lengths, batch_sizes, reset_mask);
  const auto grad_output = dense(grad_output_in, "grad_output", call.rows(call.hidden), call.dtype);
  const auto grad_h_n = dense(grad_h_n_in, "grad_h_n", call.states(), call.dtype);
  const Tensor x = dense(x_in, "x", call.rows(call.input_size), call.dtype);
  const Tensor w_ih = dense(w_ih_in, "w_ih", {call.gates, call.input_size}, call.dtype);
  const Tensor w_hh = dense(w_hh_in, "w_hh", {call.gates, call.hidden}, call.dtype);
  const Tensor reserve = dense(reserve_in, "reserve", call.rows(kGruReserve * call.hidden), compute_type(call.dtype));
  const auto grad_x = empty_if(need_x, x, call.rows(call.input_size));
  const auto grad_h0 = empty_if(state.has_value(), x, call.states_as(state));
  const auto grad_w_ih = empty_if(need_weights, x, {call.gates, call.input_size});
  const auto grad_w_hh = empty_if(need_weights, x, {call.gates, call.hidden});
  const auto grad_b_ih = empty_if(need_bias, x, {call.gates});
  const auto grad_b_hh = empty_if(need_bias, x, {call.gates});
  dispatch_with_bfloat16(call.dtype, "gru_backward", [&](auto zero) {
    using S = decltype(zero);
    RecurrentBackwardParams<S> p{};
    call.fill(p);
    p.grad_output = read<S>(grad_output), p.grad_h_n = read<S>(grad_h_n);
    p.x = read<S>(x), p.w_ih = read<S>(w_ih), p.w_hh = read<S>(w_hh), p.reserve = read<Compute<S>>(reserve);
    p.reverse = reverse;
    p.grad_x = write<S>(grad_x), p.grad_h0 = write<S>(grad_h0);
    p.grad_w_ih = write<S>(grad_w_ih), p.grad_w_hh = write<S>(grad_w_hh);
    p.grad_b_ih = write<S>(grad_b_ih), p.grad_b_hh = write<S>(grad_b_hh);
    cpu::gru_backward(p, max_threads(), parallel_for);
  });
  return {or_empty(grad_x, x),    or_empty(grad_h0, x),   or_empty(grad_w_ih, x),
          or_empty(grad_w_hh, x), or_empty(grad_b_ih, x), or_empty(grad_b_hh, x)};
}

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("gru_forward", TORCH_BOX(&fastlm::bindings::gru_forward));
  library.impl("gru_backward", TORCH_BOX(&fastlm::bindings::gru_backward));
}
