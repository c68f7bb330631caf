// GRU cell (Cho et al. 2014, arXiv:1406.1078v1; torch.nn.GRU equations):
//   r = sigmoid(W_r x + b_r + U_r h), z likewise, n = tanh(W_n x + b_in + r (U_n h + b_hn)), h' = n + z (h - n).
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/recurrent.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

struct GruCell {
  static constexpr int kGates = kGruGates, kReserve = kGruReserve, kHiddenKept = kKeptGruHidden;
  static constexpr bool kHasCellState = false;
  static constexpr bool kCarriesHidden = true;  // dh keeps a part, grad * z, under the product's sum

  // Slots that a gate's input and state parts go to; only n keeps them apart.
  static constexpr int input_slot(int gate) { return gate; }
  static constexpr int state_slot(int gate) { return gate == kNew ? kSlotNewState : gate; }
  static constexpr SlotRun kRuns[] = {{kSlotReset, kReset, 2, true, true},
                                      {kSlotNewInput, kNew, 1, true, false},
                                      {kSlotNewState, kNew, 1, false, true}};

  // to[u] = what units [unit, unit + n) of a slot start from.
  template <class S, class T>
  static void bias(const RecurrentForwardParams<S>& p, int slot, int64_t unit, int64_t n, T* to) {
    const int gate = slot == kSlotNewState ? static_cast<int>(kNew) : slot;
    const S* b_ih = p.b_ih && slot != kSlotNewState ? p.b_ih + gate * p.hidden + unit : nullptr;
    const S* b_hh = p.b_hh && slot != kSlotNewInput ? p.b_hh + gate * p.hidden + unit : nullptr;
    for (int64_t u = 0; u < n; ++u) to[u] = (b_ih ? widen(b_ih[u]) : T(0)) + (b_hh ? widen(b_hh[u]) : T(0));
  }

  // Units [u, u + n) of one row, n <= kLanes of the vector or pack V. In two passes over all rows, the second from what
  // the first leaves in the slots: the processor cannot look far enough ahead to fill the waits of one long chain.
  template <class V, class S, class E, class T = Compute<S>>
  static FASTLM_INLINE void forward_gates(const ForwardRow<S, E>& row, int64_t u, int64_t n) {
    for (const int gate : {kReset, kUpdate}) {
      T* slot = row.slots + gate * kCols<T> + u;
      const V value = sigmoid(V::load(slot));
      value.store(slot);
      if (row.reserve) put_as(value, row.reserve + gate * row.hidden + u, n, row.streams_reserve);
    }
  }
  template <class V, class S, class E, class T = Compute<S>>
  static FASTLM_INLINE void forward_state(const ForwardRow<S, E>& row, int64_t u, int64_t n) {
    const auto slot = [&](int i) FASTLM_LAMBDA_INLINE { return V::load(row.slots + i * kCols<T> + u); };
    const V state = slot(kSlotNewState), z = slot(kSlotUpdate), h = load_columns<V>(row.h, u);
    const V candidate = tanh(fma(slot(kSlotReset), state, slot(kSlotNewInput)));
    const V h_new = rounded_to<S>(fma(z, h - candidate, candidate));
    store_columns(h_new, row.h_new, u, n);
    put_as(h_new, row.output + u, n, row.streams_output);
    if (!row.reserve) return;
    const auto keep = [&](int column, const V& value) FASTLM_LAMBDA_INLINE {
      put_as(value, row.reserve + column * row.hidden + u, n, row.streams_reserve);
    };
    keep(kKeptNew, candidate), keep(kKeptNewState, state), keep(kKeptGruHidden, h);
  }

  // row.dh, in: gradient of the state after the step; out: its part that bypasses the product.
  template <class V, class S>
  static FASTLM_INLINE void backward(const BackwardRow<S>& row, int64_t u, int64_t n) {
    const auto kept = [&](int column)
                          FASTLM_LAMBDA_INLINE { return V::load_partial(row.reserve + column * row.hidden + u, n); };
    const V r = kept(kKeptReset), z = kept(kKeptUpdate), candidate = kept(kKeptNew), one = V::broadcast(1);
    V grad = V::load(row.dh + u);
    if (row.grad_output) grad = grad + load_as<V>(row.grad_output + u, n);
    const V keep = one - z;
    const V d_new = grad * keep * fnma(candidate, candidate, one);
    const V d_update = grad * (kept(kKeptGruHidden) - candidate) * (z * keep);
    const V d_reset = d_new * kept(kKeptNewState) * (r * (one - r));
    const auto put = [&](int slot, const V& value)
                         FASTLM_LAMBDA_INLINE { value.store_partial(row.d_gates + slot * row.hidden + u, n); };
    put(kSlotReset, d_reset), put(kSlotUpdate, d_update), put(kSlotNewInput, d_new), put(kSlotNewState, d_new * r);
    (grad * z).store(row.dh + u);
  }
};

FASTLM_RECURRENT_KERNELS(kGru, GruCell);

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
