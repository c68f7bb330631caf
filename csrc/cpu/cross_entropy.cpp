#include "cpu/cross_entropy.h"

#include <algorithm>

#include "cpu/cost.h"
#include "cpu/isa.h"
#include "cpu/sum_tree.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kWordsAtLeast = 32;  // of a part
// Of so few words, rows are shared. Every item has a gradient of weight of its own, which costs as much as many rows.
constexpr int64_t kFewWords = 512, kItemsAtMost = 16, kItemsOfFewRows = 4;
constexpr int64_t kRowsWanted = 512, kRowsAtLeast = 64;

// A power of two, which numbers of threads mostly divide.
int64_t items_of(int64_t rows) {
  const int64_t most =
      std::max(std::min(rows / kRowsWanted, kItemsAtMost), std::min(rows / kRowsAtLeast, kItemsOfFewRows));
  int64_t items = 1;
  while (2 * items <= most) items *= 2;
  return items;
}

}  // namespace

template <class S>
void cross_entropy(const CrossEntropyParams<S>& p, int max_threads, ParallelFor parallel_for) {
  CrossEntropyPlan plan{};
  plan.items = p.vocab <= kFewWords ? items_of(p.live_rows) : 1;
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
