// Entry of the output layer with its loss: how the work is shared.
//
// Many words are cut into parts, which the members share within a pass over all rows. Of few words, parts would be too
// few or too small, and members would meet too often: the rows are cut into items, each a pass of its own with a
// gradient of weight of its own, and these meet in the end, in fixed order.
#pragma once

#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels/cross_entropy_pass.inl"
#include "cpu/subnormals.h"

#ifdef FASTLM_FLOATS_ELSEWHERE
namespace fastlm::cpu::FASTLM_FLOATS_ELSEWHERE {
extern const CrossEntropyKernels<float> kCrossEntropyFloat;
}
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S>
void clear_dead_rows(const CrossEntropyParams<S>& p, const Team& team) {
  const auto own = team.split(p.rows);
  const int64_t* live = std::lower_bound(p.live, p.live + p.live_rows, own.begin);
  for (int64_t r = own.begin; r < own.end; ++r) {
    if (live != p.live + p.live_rows && *live == r) {
      ++live;
      continue;
    }
    if (p.losses) p.losses[r] = p.statistics[r] = p.statistics[p.rows + r] = 0;
    if (p.grad_hidden) std::fill_n(p.grad_hidden + r * p.dim, p.dim, S{});
  }
}

// to = the sums of `items`, one after another, each of n values.
template <class S, class T>
void sum_items(const T* from, int64_t items, int64_t n, S* to, const Team& team) {
  using V = Vec<T>;
  if (!to || static_cast<const void*>(from) == to) return;
  const auto own = team.split(n, V::kLanes);
  for (int64_t i = own.begin; i < own.end; i += V::kLanes) {
    V sum = V::load_partial(from + i, n - i);
    for (int64_t item = 1; item < items; ++item) sum = sum + V::load_partial(from + item * n + i, n - i);
    store_as(sum, to + i, n - i);
  }
}

template <class S>
class CrossEntropyCall {
 public:
  CrossEntropyCall(const CrossEntropyParams<S>& p, const CrossEntropyPlan& plan)
      : p_(p), plan_(plan), layout_(Pass::Layout::make(item(0), plan)), shared_(plan.items > 1 ? plan.threads : 1) {
    own_.resize(plan.threads);
    take();
    workspace_.allocate();
    take();
  }

  void run(const Team& team) const {
    clear_dead_rows(p_, team);
    if (plan_.items == 1)
      Pass(p_, layout_, shared_[0], own_[team.rank], sums_, team).run();
    else
      team.share(plan_.items, false, [&](int64_t i) { run_item(i, team.rank); });
    team.barrier();
    sum_items(sums_.weight, plan_.items, p_.vocab * p_.dim, p_.grad_weight, team);
    sum_items(sums_.bias, plan_.items, p_.vocab, p_.grad_bias, team);
  }

 private:
  using Pass = CrossEntropy<S>;

  // The rows of one item. The first is none the smaller.
  CrossEntropyParams<S> item(int64_t i) const {
    const auto begin = [&](int64_t i) { return p_.live_rows - p_.live_rows * (plan_.items - i) / plan_.items; };
    CrossEntropyParams<S> part = p_;
    part.live += begin(i), part.live_rows = begin(i + 1) - begin(i);
    return part;
  }

  void run_item(int64_t i, int rank) const {
    TeamState alone(1);
    typename Pass::Sums sums = sums_;
    if (sums.weight) sums.weight += i * p_.vocab * p_.dim;
    if (sums.bias) sums.bias += i * p_.vocab;
    const auto part = item(i);
    Pass(part, layout_, shared_[rank], own_[rank], sums, Team(&alone, 0, 1)).run();
  }

  void take() {
    for (auto& shared : shared_) shared = Pass::Shared::take(workspace_, p_, layout_);
    for (auto& own : own_) own = Pass::Own::take(workspace_, p_, layout_);
    sums_ = Pass::Sums::take(workspace_, p_, plan_.items);
    for (auto& shared : shared_) shared.take_slabs(workspace_, p_, layout_, &tree_);
  }

  const CrossEntropyParams<S>& p_;
  const CrossEntropyPlan& plan_;
  const typename Pass::Layout layout_;
  Workspace workspace_;
  SumTree tree_{static_cast<int>(plan_.parts)};
  std::vector<typename Pass::Shared> shared_;  // of all members, or of each
  std::vector<typename Pass::Own> own_;
  typename Pass::Sums sums_;
};

template <class S>
void cross_entropy(const CrossEntropyParams<S>& p, const CrossEntropyPlan& plan, ParallelFor parallel_for,
                   std::atomic<bool>* beyond) {
  const CrossEntropyCall<S> call(p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<Operand<S>> watch(beyond);
    call.run(team);
  });
}

template <class S>
void cross_entropy_entry(const CrossEntropyParams<S>& p, const CrossEntropyPlan& plan, ParallelFor parallel_for) {
  cross_entropy(p, plan, parallel_for, nullptr);
}
#ifdef FASTLM_FLOATS_ELSEWHERE
// Of floats that are split, where there are enough products to each.
template <>
inline void cross_entropy_entry(const CrossEntropyParams<float>& p, const CrossEntropyPlan& plan,
                                ParallelFor parallel_for) {
  constexpr int64_t kRowsAtLeast = 128, kWordsAtLeast = 128;
  const int64_t dim = CrossEntropy<float>::has_gradients(p) ? 96 : 64;
  std::atomic<bool> beyond{p.live_rows < kRowsAtLeast * plan.items || p.vocab < kWordsAtLeast || p.dim < dim};
  if (!beyond) cross_entropy(p, plan, parallel_for, &beyond);
  if (beyond) FASTLM_FLOATS_ELSEWHERE::kCrossEntropyFloat.run(p, plan, parallel_for);
}
extern const CrossEntropyKernels<float> kCrossEntropyFloat{cross_entropy_entry<float>};
#endif

#ifndef FASTLM_BFLOAT16_ONLY
extern const CrossEntropyKernels<float> kCrossEntropyFloat{cross_entropy_entry<float>};
extern const CrossEntropyKernels<double> kCrossEntropyDouble{cross_entropy_entry<double>};
#endif
extern const CrossEntropyKernels<BFloat16> kCrossEntropyBFloat16{cross_entropy_entry<BFloat16>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
