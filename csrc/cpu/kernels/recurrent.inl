// The time loop shared by GRU and LSTM, forward and backward; what differs is a Cell (gru.inl, lstm.inl).
//
// Hidden units are worked on in blocks of kCols. The four slots of a block (core/gates.h) lie side by side, so that a
// panel of weights meets the rows of h, and the activations follow while the sums are still in L1.
//
// Two ways to share the work. Rows of the batch: no synchronisation inside a chunk. Units of the hidden state (large
// weights): every member reads only its part of the weights, with one barrier a step; blocks change hands within a step
// where a member is behind (Team::share).
#pragma once

#include "cpu/kernels/recurrent_backward.inl"
#include "cpu/kernels/recurrent_forward.inl"
#include "cpu/kernels/stream.inl"
#include "cpu/subnormals.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S, class P, class Cell>
void forward_with_panels(const RecurrentForwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  Workspace workspace;
  ForwardBuffers<S, P>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = ForwardBuffers<S, P>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    ForwardPass<S, P, Cell>(p, plan, buffers, team).run();
  });
}

template <class S, class Cell>
void recurrent_forward(const RecurrentForwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  if constexpr (!kPairs<Operand<S>>)
    if (!plan.direct && p.batch > kNarrowRowsAtMost)
      return forward_with_panels<S, Compute<S>, Cell>(p, plan, parallel_for);
  forward_with_panels<S, S, Cell>(p, plan, parallel_for);
}

template <class S, class E, class Cell>
void backward_with_operands(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  using Buffers = BackwardBuffers<S, E, Cell>;
  Workspace workspace;
  Buffers::take(workspace, p, plan);
  workspace.allocate();
  const auto buffers = Buffers::take(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    BackwardPass<S, E, Cell>(p, plan, buffers, team).run();
  });
}

template <class S, class Cell>
void recurrent_backward(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  if (plan.direct) return backward_with_operands<S, Compute<S>, Cell>(p, plan, parallel_for);
  backward_with_operands<S, Operand<S>, Cell>(p, plan, parallel_for);
}

// A cell's entries in the table, for every element type.
template <class S, class Cell>
constexpr RecurrentKernels<S> recurrent_kernels() {
  return {recurrent_forward<S, Cell>, recurrent_backward<S, Cell>, make_stream<S, Cell>,
          kWidens<S> ? kNarrowRowsInPlace : kBroadcastRowsAtMost};
}
#ifdef FASTLM_BFLOAT16_ONLY
#define FASTLM_RECURRENT_KERNELS(name, Cell) \
  extern const RecurrentKernels<BFloat16> name##BFloat16 = recurrent_kernels<BFloat16, Cell>()
#else
#define FASTLM_RECURRENT_KERNELS(name, Cell)                                              \
  extern const RecurrentKernels<float> name##Float = recurrent_kernels<float, Cell>();    \
  extern const RecurrentKernels<double> name##Double = recurrent_kernels<double, Cell>(); \
  extern const RecurrentKernels<BFloat16> name##BFloat16 = recurrent_kernels<BFloat16, Cell>()
#endif

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
