#include "cpu/cross_entropy.h"

#include <algorithm>

#include "cpu/cost.h"
#include "cpu/isa.h"
#include "cpu/sum_tree.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kWordsAtLeast = 32;  // of a part
// Of so few words, rows are shared. Every item has a gradient of weight of its own.
constexpr int64_t kFewWords = 512, kItemsAtMost = 16, kRowsAtLeast = 128;

}  // namespace

template <class S>
void cross_entropy(const CrossEntropyParams<S>& p, int max_threads, ParallelFor parallel_for) {
  CrossEntropyPlan plan{};
  plan.items = p.vocab <= kFewWords ? std::clamp<int64_t>(p.live_rows / kRowsAtLeast, 1, kItemsAtMost) : 1;
  plan.parts = plan.items > 1 ? 1 : std::clamp<int64_t>(p.vocab / kWordsAtLeast, 1, SumTree::kPartsAtMost);
  const double products = 1. + (p.grad_hidden != nullptr) + (p.grad_weight != nullptr);
  plan.work_ns = static_cast<int64_t>(products * 2. * p.live_rows * p.vocab * (p.dim + 8.) / kFlopsPerNs);
  plan.threads = threads_for(plan.work_ns, kNsPerThread, std::min<int64_t>(max_threads, plan.parts * plan.items));
  kernels<S>().cross_entropy->run(p, plan, parallel_for);
}

template void cross_entropy(const CrossEntropyParams<float>&, int, ParallelFor);
template void cross_entropy(const CrossEntropyParams<double>&, int, ParallelFor);
template void cross_entropy(const CrossEntropyParams<BFloat16>&, int, ParallelFor);

}  // namespace fastlm::cpu
