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

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T, class Cell>
void recurrent_forward(const RecurrentForwardParams<T>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  Workspace workspace;
  ForwardBuffers<T>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = ForwardBuffers<T>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns,
           [&](const Team& team) { ForwardPass<T, Cell>(p, plan, buffers, team).run(); });
}

template <class T, class Cell>
void recurrent_backward(const RecurrentBackwardParams<T>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  Workspace workspace;
  BackwardBuffers<T>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = BackwardBuffers<T>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns,
           [&](const Team& team) { BackwardPass<T, Cell>(p, plan, buffers, team).run(); });
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
