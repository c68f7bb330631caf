// LSTM cell (Hochreiter and Schmidhuber 1997, with forget gate; torch.nn.LSTM equations):
//   i, f, o = sigmoid(W x + b + U h), g = tanh(W_g x + b_g + U_g h), c' = f c + i g, h' = o tanh(c').
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/recurrent.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

struct LstmCell {
  static constexpr int kGates = kLstmGates, kReserve = kLstmReserve, kHiddenKept = kKeptLstmHidden;
  static constexpr bool kHasCellState = true;
  static constexpr bool kCarriesHidden = false;  // all of dh comes out of the product

  static constexpr int input_slot(int gate) { return gate; }
  static constexpr int state_slot(int gate) { return gate; }
  static constexpr SlotRun kRuns[] = {{0, 0, kGates, true, true}};

  // to[u] = what units [unit, unit + n) of a slot start from.
  template <class S, class T>
  static void bias(const RecurrentForwardParams<S>& p, int slot, int64_t unit, int64_t n, T* to) {
    const int64_t first = slot * p.hidden + unit;
    for (int64_t u = 0; u < n; ++u)
      to[u] = (p.b_ih ? widen(p.b_ih[first + u]) : T(0)) + (p.b_hh ? widen(p.b_hh[first + u]) : T(0));
  }

  // Units [u, u + n) of one row, n <= kLanes of the vector or pack V. In two passes over all rows, the second from what
  // the first leaves in the slots: the processor cannot look far enough ahead to fill the waits of one long chain.
  template <class V, class S, class E, class T = Compute<S>>
  static FASTLM_INLINE void forward_gates(const ForwardRow<S, E>& row, int64_t u, int64_t n) {
    const auto slot = [&](int gate) FASTLM_LAMBDA_INLINE { return V::load(row.slots + gate * kCols<T> + u); };
    const V i = sigmoid(slot(kInput)), f = sigmoid(slot(kForget)), g = tanh(slot(kCell)), o = sigmoid(slot(kOutput));
    const auto put = [&](int gate, const V& value) FASTLM_LAMBDA_INLINE {
      value.store(row.slots + gate * kCols<T> + u);
      if (row.reserve) put_as(value, row.reserve + gate * row.hidden + u, n, row.streams_reserve);
    };
    put(kInput, i), put(kForget, f), put(kCell, g), put(kOutput, o);
  }
  template <class V, class S, class E, class T = Compute<S>>
  static FASTLM_INLINE void forward_state(const ForwardRow<S, E>& row, int64_t u, int64_t n) {
    const auto slot = [&](int i) FASTLM_LAMBDA_INLINE { return V::load(row.slots + i * kCols<T> + u); };
    const V c = V::load(row.c + u), c_new = fma(slot(kForget), c, slot(kInput) * slot(kCell));
    const V h_new = rounded_to<S>(slot(kOutput) * tanh(c_new));
    c_new.store(row.c + u);
    store_columns(h_new, row.h_new, u, n);
    put_as(h_new, row.output + u, n, row.streams_output);
    if (row.cells) store_as(c_new, row.cells + u, n);
    if (!row.reserve) return;
    const auto keep = [&](int column, const V& value) FASTLM_LAMBDA_INLINE {
      put_as(value, row.reserve + column * row.hidden + u, n, row.streams_reserve);
    };
    keep(kKeptCell, c), keep(kKeptLstmHidden, load_columns<V>(row.h, u));
  }

  // row.dh, row.dc, in: gradients of the states after the step; out: dc of the state before.
  template <class V, class S>
  static FASTLM_INLINE void backward(const BackwardRow<S>& row, int64_t u, int64_t n) {
    const auto kept = [&](int column)
                          FASTLM_LAMBDA_INLINE { return V::load_partial(row.reserve + column * row.hidden + u, n); };
    const V i = kept(kInput), f = kept(kForget), g = kept(kCell), o = kept(kOutput), c = kept(kKeptCell);
    const V one = V::broadcast(1), tanh_c = tanh(fma(f, c, i * g));
    V grad = V::load(row.dh + u);
    if (row.grad_output) grad = grad + load_as<V>(row.grad_output + u, n);
    V d_c = fma(grad * o, fnma(tanh_c, tanh_c, one), V::load(row.dc + u));
    if (row.grad_cells) d_c = d_c + load_as<V>(row.grad_cells + u, n);
    const auto put = [&](int slot, const V& value)
                         FASTLM_LAMBDA_INLINE { value.store_partial(row.d_gates + slot * row.hidden + u, n); };
    put(kInput, d_c * g * (i * (one - i)));
    put(kForget, d_c * c * (f * (one - f)));
    put(kCell, d_c * i * fnma(g, g, one));
    put(kOutput, grad * tanh_c * (o * (one - o)));
    (d_c * f).store(row.dc + u);
  }
};

FASTLM_RECURRENT_KERNELS(kLstm, LstmCell);

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
