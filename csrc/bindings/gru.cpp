#include "bindings/recurrent.h"
#include "core/gates.h"
#include "cpu/recurrent.h"

namespace fastlm::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& x_in, const OptionalTensor& h0_in, const Tensor& w_ih_in,
                                               const Tensor& w_hh_in, const OptionalTensor& b_ih_in,
                                               const OptionalTensor& b_hh_in, bool reverse, bool save) {
  const RecurrentShape s(x_in, w_hh_in, kGruGates);
  const auto dtype = x_in.scalar_type();
  const Tensor x = dense(x_in, "x", {s.seq_len, s.batch, s.input_size}, dtype);
  const auto h0 = dense(h0_in, "h0", {s.batch, s.hidden}, dtype);
  const Tensor w_ih = dense(w_ih_in, "w_ih", {s.gates, s.input_size}, dtype);
  const Tensor w_hh = dense(w_hh_in, "w_hh", {s.gates, s.hidden}, dtype);
  const auto b_ih = dense(b_ih_in, "b_ih", {s.gates}, dtype);
  const auto b_hh = dense(b_hh_in, "b_hh", {s.gates}, dtype);
  const Tensor output = empty(x, {s.seq_len, s.batch, s.hidden}), h_n = empty(x, {s.batch, s.hidden});
  const auto reserve = empty_if(save, x, {s.seq_len, s.batch, kGruReserve * s.hidden});
  dispatch(dtype, "gru_forward", [&](auto zero) {
    using T = decltype(zero);
    RecurrentForwardParams<T> p{};
    s.fill(p);
    p.x = read<T>(x), p.h0 = read<T>(h0), p.w_ih = read<T>(w_ih), p.w_hh = read<T>(w_hh);
    p.b_ih = read<T>(b_ih), p.b_hh = read<T>(b_hh), p.reverse = reverse;
    p.output = write<T>(output), p.h_n = write<T>(h_n), p.reserve = write<T>(reserve);
    cpu::gru_forward(p, max_threads(), parallel_for);
  });
  return {output, h_n, or_empty(reserve, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(const OptionalTensor& grad_output_in,
                                                                        const OptionalTensor& grad_h_n_in,
                                                                        const Tensor& x_in, const Tensor& w_ih_in,
                                                                        const Tensor& w_hh_in, const Tensor& reserve_in,
                                                                        bool reverse, bool need_x, bool need_h0,
                                                                        bool need_weights, bool need_bias) {
  const RecurrentShape s(x_in, w_hh_in, kGruGates);
  const auto dtype = x_in.scalar_type();
  const auto grad_output = dense(grad_output_in, "grad_output", {s.seq_len, s.batch, s.hidden}, dtype);
  const auto grad_h_n = dense(grad_h_n_in, "grad_h_n", {s.batch, s.hidden}, dtype);
  const Tensor x = dense(x_in, "x", {s.seq_len, s.batch, s.input_size}, dtype);
  const Tensor w_ih = dense(w_ih_in, "w_ih", {s.gates, s.input_size}, dtype);
  const Tensor w_hh = dense(w_hh_in, "w_hh", {s.gates, s.hidden}, dtype);
  const Tensor reserve = dense(reserve_in, "reserve", {s.seq_len, s.batch, kGruReserve * s.hidden}, dtype);
  const auto grad_x = empty_if(need_x, x, {s.seq_len, s.batch, s.input_size});
  const auto grad_h0 = empty_if(need_h0, x, {s.batch, s.hidden});
  const auto grad_w_ih = empty_if(need_weights, x, {s.gates, s.input_size});
  const auto grad_w_hh = empty_if(need_weights, x, {s.gates, s.hidden});
  const auto grad_b_ih = empty_if(need_bias, x, {s.gates});
  const auto grad_b_hh = empty_if(need_bias, x, {s.gates});
  dispatch(dtype, "gru_backward", [&](auto zero) {
    using T = decltype(zero);
    RecurrentBackwardParams<T> p{};
    s.fill(p);
    p.grad_output = read<T>(grad_output), p.grad_h_n = read<T>(grad_h_n);
    p.x = read<T>(x), p.w_ih = read<T>(w_ih), p.w_hh = read<T>(w_hh), p.reserve = read<T>(reserve);
    p.reverse = reverse;
    p.grad_x = write<T>(grad_x), p.grad_h0 = write<T>(grad_h0);
    p.grad_w_ih = write<T>(grad_w_ih), p.grad_w_hh = write<T>(grad_w_hh);
    p.grad_b_ih = write<T>(grad_b_ih), p.grad_b_hh = write<T>(grad_b_hh);
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
