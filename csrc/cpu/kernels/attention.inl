// Entries of attention: scratch, the team, and items dealt to its members.
#pragma once

#include "cpu/kernels/attention_backward.inl"
#include "cpu/kernels/attention_decode.inl"
#include "cpu/subnormals.h"

#ifdef FASTLM_FLOATS_ELSEWHERE
namespace fastlm::cpu::FASTLM_FLOATS_ELSEWHERE {
extern const AttentionKernels<float> kAttentionFloat;
}
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// body(i) for n items, however many, between all members.
template <class Body>
void share_all(const Team& team, int64_t n, const Body& body) {
  constexpr int64_t kMost = 1 << 23;
  for (int64_t first = 0; first < n; first += kMost)
    team.share(std::min(kMost, n - first), false, [&](int64_t i) { body(first + i); });
}

template <class S>
void decode(const AttentionForwardParams<S>& p, const AttentionPlan& plan, ParallelFor parallel_for) {
  using Pass = AttentionDecode<S>;
  Workspace workspace;
  Pass::Buffers::take(workspace, p, plan);
  workspace.allocate();
  const auto buffers = Pass::Buffers::take(workspace, p, plan);
  const auto items = static_cast<int64_t>(plan.items.size());
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    Pass pass(p, plan, buffers, team.rank);
    share_all(team, items, [&](int64_t i) { pass.run(i); });
    team.barrier();
    share_all(team, items, [&](int64_t i) { pass.combine(i); });
  });
}

template <class S>
void attend(const AttentionForwardParams<S>& p, const AttentionPlan& plan, ParallelFor parallel_for,
            std::atomic<bool>* beyond) {
  using Pass = AttentionForward<S>;
  Workspace workspace;
  for (int i = 0; i < plan.threads; ++i) Pass::Buffers::take(workspace, p, plan.most_rows);
  workspace.allocate();
  std::vector<typename Pass::Buffers> buffers;
  for (int i = 0; i < plan.threads; ++i) buffers.push_back(Pass::Buffers::take(workspace, p, plan.most_rows));
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<Operand<S>> watch(beyond);
    Pass pass(p, buffers[team.rank]);
    share_all(team, static_cast<int64_t>(plan.items.size()), [&](int64_t i) { pass.run(plan.items[i]); });
  });
}

template <class S>
void attend_backward(const AttentionBackwardParams<S>& p, const AttentionPlan& plan, ParallelFor parallel_for,
                     std::atomic<bool>* beyond) {
  using Pass = AttentionBackward<S>;
  Workspace workspace;
  const auto take = [&](int member) {
    return Pass::Buffers::take(workspace, p, plan, member == 0 ? Pass::partial_rows(p, plan) : 0);
  };
  for (int i = 0; i < plan.threads; ++i) take(i);
  workspace.allocate();
  std::vector<typename Pass::Buffers> buffers;
  for (int i = 0; i < plan.threads; ++i) {
    buffers.push_back(take(i));
    buffers[i].partial = buffers[0].partial;
  }
  run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<Operand<S>> watch(beyond);
    Pass pass(p, plan, buffers[team.rank]);
    share_all(team, static_cast<int64_t>(plan.items.size()), [&](int64_t i) { pass.run(plan.items[i]); });
    if (plan.parts == 1) return;
    team.barrier();
    share_all(team, p.batch * p.q_heads, [&](int64_t i) { pass.combine(i / p.q_heads, i % p.q_heads); });
  });
}

template <class S>
void attention_forward(const AttentionForwardParams<S>& p, const AttentionPlan& plan, ParallelFor parallel_for) {
  plan.decode ? decode(p, plan, parallel_for) : attend(p, plan, parallel_for, nullptr);
}
template <class S>
void attention_backward(const AttentionBackwardParams<S>& p, const AttentionPlan& plan, ParallelFor parallel_for) {
  attend_backward(p, plan, parallel_for, nullptr);
}

#ifdef FASTLM_FLOATS_ELSEWHERE
// Whether floats are split: where there are enough products to each.
inline bool splits(const AttentionParams<float>& p) {
  constexpr int64_t kDimAtLeast = 24, kLengthAtLeast = 128, kLengthAtLeastOfPart = 256;
  const int64_t length = std::min(p.q_len, p.k_len);
  const auto reaches = [&](int64_t side) { return side < 0 || side >= length; };
  const bool all = reaches(p.left) && reaches(p.right);  // whether queries see all keys, the mask apart
  return std::min(p.dim, p.v_dim) >= kDimAtLeast && length >= (all ? kLengthAtLeast : kLengthAtLeastOfPart);
}
inline void split_attention_forward(const AttentionForwardParams<float>& p, const AttentionPlan& plan,
                                    ParallelFor parallel_for) {
  std::atomic<bool> beyond{plan.decode || p.weights || !splits(p)};
  if (!beyond) attend(p, plan, parallel_for, &beyond);
  if (beyond) FASTLM_FLOATS_ELSEWHERE::kAttentionFloat.forward(p, plan, parallel_for);
}
inline void split_attention_backward(const AttentionBackwardParams<float>& p, const AttentionPlan& plan,
                                     ParallelFor parallel_for) {
  const auto plain = FASTLM_FLOATS_ELSEWHERE::kAttentionFloat.backward;
  if (!splits(p)) return plain(p, plan, parallel_for);
  std::atomic<bool> beyond{false};
  attend_backward(p, plan, parallel_for, &beyond);
  if (!beyond) return;
  std::fill_n(p.grad_bias.data, p.grad_bias_numbers, 0.f);  // it is added to
  plain(p, plan, parallel_for);
}
extern const AttentionKernels<float> kAttentionFloat{split_attention_forward, split_attention_backward};
#endif
#ifndef FASTLM_BFLOAT16_ONLY
extern const AttentionKernels<float> kAttentionFloat{attention_forward<float>, attention_backward<float>};
extern const AttentionKernels<double> kAttentionDouble{attention_forward<double>, attention_backward<double>};
#endif
extern const AttentionKernels<BFloat16> kAttentionBFloat16{attention_forward<BFloat16>, attention_backward<BFloat16>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
