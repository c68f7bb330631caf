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

#ifdef FASTLM_FLOATS_ELSEWHERE
namespace fastlm::cpu::FASTLM_FLOATS_ELSEWHERE {
extern const RecurrentKernels<float> kGruFloat, kLstmFloat;
}
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S, class P, class Cell, class Q = P>
void forward_with_panels(const RecurrentForwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for,
                         std::atomic<bool>* beyond = nullptr) {
  Workspace workspace;
  ForwardBuffers<S, P, Q>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = ForwardBuffers<S, P, Q>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<Operand<S>> watch(beyond);
    ForwardPass<S, P, Cell, Q>(p, plan, buffers, team).run();
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
void backward_with_operands(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for,
                            std::atomic<bool>* beyond = nullptr) {
  using Buffers = BackwardBuffers<S, E, Cell>;
  Workspace workspace;
  Buffers::take(workspace, p, plan);
  workspace.allocate();
  const auto buffers = Buffers::take(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<E> watch(beyond);
    BackwardPass<S, E, Cell>(p, plan, buffers, team).run();
  });
}

template <class S, class Cell>
void recurrent_backward(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  if (plan.direct) return backward_with_operands<S, Compute<S>, Cell>(p, plan, parallel_for);
  backward_with_operands<S, Operand<S>, Cell>(p, plan, parallel_for);
}

#ifdef FASTLM_FLOATS_ELSEWHERE
// Whether floats are split, and whether also where they meet the recurrent weights, which come again in every step:
// they must be near, or the rows of a step be many. From sizes alone, not threads, that sums may not depend on.
struct Splits {
  bool any, state;

  template <class Params>
  static Splits of(const Params& p, const RecurrentPlan& plan, int gates, bool backward) {
    constexpr int64_t kRowsAtLeast = 256, kInputAtLeast = 128;
    const int64_t state_bytes = gates * p.hidden * p.hidden * static_cast<int64_t>(sizeof(SplitFloat));
    const int64_t tiles = (p.batch + kTileSide - 1) / kTileSide * kTileSide;
    const bool many = p.batch >= 2 * kTileSide, full = 4 * p.batch >= 3 * tiles;
    Splits splits{};
    splits.state = many || (p.batch >= kTileSide && full && state_bytes <= l2_bytes());
    const int64_t units = splits.state ? (many ? 64 : 128) : 192;
    // The input's weights come again for every chunk of steps, from L3 where they are many.
    const int64_t input_bytes = gates * p.hidden * p.input_size * static_cast<int64_t>(sizeof(SplitFloat));
    const bool input_pays = p.input_size >= kInputAtLeast && input_bytes <= 4 * l2_bytes();
    const bool pays =
        backward ? p.hidden >= std::max<int64_t>(96, units) : p.hidden >= units && (splits.state || input_pays);
    splits.any = !plan.direct && pays && p.batch > 0 && StepRows(p).all() >= kRowsAtLeast;
    return splits;
  }
};

template <class Cell, const RecurrentKernels<float>& kPlain>
void split_forward(const RecurrentForwardParams<float>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  const auto splits = Splits::of(p, plan, Cell::kGates, false);
  std::atomic<bool> beyond{!splits.any};
  if (splits.any && splits.state)
    forward_with_panels<float, SplitFloat, Cell>(p, plan, parallel_for, &beyond);
  else if (splits.any)
    forward_with_panels<float, SplitFloat, Cell, float>(p, plan, parallel_for, &beyond);
  if (beyond) kPlain.forward(p, plan, parallel_for);
}
template <class Cell, const RecurrentKernels<float>& kPlain>
void split_backward(const RecurrentBackwardParams<float>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  const auto splits = Splits::of(p, plan, Cell::kGates, true);
  std::atomic<bool> beyond{!splits.any};
  RecurrentPlan split = plan;
  split.splits_state = splits.state;
  if (splits.any) backward_with_operands<float, SplitFloat, Cell>(p, split, parallel_for, &beyond);
  if (beyond) kPlain.backward(p, plan, parallel_for);
}
template <const RecurrentKernels<float>& kPlain>
Stream<float>* plain_stream(const StreamParams<float>& params) {
  return kPlain.stream(params);
}
template <class Cell, const RecurrentKernels<float>& kPlain>
constexpr RecurrentKernels<float> split_kernels() {
  return {split_forward<Cell, kPlain>, split_backward<Cell, kPlain>, plain_stream<kPlain>, kBroadcastRowsAtMost,
          sizeof(SplitFloat)};
}
#endif

// A cell's entries in the table, for every element type.
template <class S, class Cell>
constexpr RecurrentKernels<S> recurrent_kernels() {
  return {recurrent_forward<S, Cell>, recurrent_backward<S, Cell>, make_stream<S, Cell>,
          kWidens<S> ? kNarrowRowsInPlace : kBroadcastRowsAtMost, sizeof(Compute<S>)};
}
#ifdef FASTLM_FLOATS_ELSEWHERE
#define FASTLM_RECURRENT_KERNELS(name, Cell)                                                                      \
  extern const RecurrentKernels<float> name##Float = split_kernels<Cell, FASTLM_FLOATS_ELSEWHERE::name##Float>(); \
  extern const RecurrentKernels<BFloat16> name##BFloat16 = recurrent_kernels<BFloat16, Cell>()
#elif defined(FASTLM_BFLOAT16_ONLY)
#define FASTLM_RECURRENT_KERNELS(name, Cell) \
  extern const RecurrentKernels<BFloat16> name##BFloat16 = recurrent_kernels<BFloat16, Cell>()
#else
#define FASTLM_RECURRENT_KERNELS(name, Cell)                                              \
  extern const RecurrentKernels<float> name##Float = recurrent_kernels<float, Cell>();    \
  extern const RecurrentKernels<double> name##Double = recurrent_kernels<double, Cell>(); \
  extern const RecurrentKernels<BFloat16> name##BFloat16 = recurrent_kernels<BFloat16, Cell>()
#endif

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
