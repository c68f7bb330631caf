#include "cpu/attention.h"

#include <algorithm>

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kDecodeRows = 12;        // query heads times queries up to which keys are not packed
constexpr int64_t kDecodeKeys = 512;       // per item, about
constexpr int64_t kItemsWanted = 16;       // so many items keep a few threads busy to the end
constexpr int64_t kPartsWanted = 8;        // the same for backward, where parts of one head cost memory
constexpr int64_t kRowsAtLeast = 96;       // per item, so that packing keys does not show
constexpr int64_t kRowsWeighed = 32;       // the same where weights are wanted
constexpr int64_t kWeightsHeld = 1 << 21;  // numbers in an item, at most, until its rows become too few
constexpr int64_t kKeysAtLeast = 512;      // per item of backward, likewise
constexpr double kBytesPerNs = 20;         // of one core, cautiously

// Of queries in one item: they, their sums and a chunk of keys share L2. At most what was measured with 2 MiB of it.
int64_t forward_values() { return std::clamp<int64_t>(l2_bytes() / 64, 16384, 32768); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S>
double pairs(const AttentionParams<S>& p, const AttentionSequence& sequence) {
  double seen = sequence.k_len;
  if (p.left >= 0 && p.right >= 0)
    seen = std::min<double>(seen, static_cast<double>(p.left) + p.right + 1);
  else if (p.right >= 0 && sequence.q_len > 1)
    seen /= 2;
  return seen * sequence.q_len;
}

// Nanoseconds on one thread, as measured over small calls: products apart.
struct Cost {
  double head, query, pair;       // of a head, of a query of it, of a query and a key
  double query_value, key_value;  // of a number of q, k and v: they are packed, copied, brought together
};
constexpr Cost kForwardCost{100, 30, 0.2, 0.25, 0.06}, kBackwardCost{160, 25, 0.7, 0.6, 0.5};

template <class S>
void estimate(AttentionPlan& plan, const AttentionParams<S>& p, const Cost& cost, double flops_per_pair,
              int max_threads) {
  const auto width = static_cast<double>(p.dim + p.v_dim);
  double work = 0, bytes = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto sequence = attention_sequence(p, b);
    const auto queries = static_cast<double>(sequence.q_len), keys = static_cast<double>(sequence.k_len);
    work += p.q_heads * (cost.head + queries * (cost.query + width * cost.query_value) +
                         pairs(p, sequence) * (cost.pair + flops_per_pair / kFlopsPerNs));
    work += p.kv_heads * keys * width * cost.key_value;
    bytes += sizeof(S) * p.kv_heads * keys * width;
  }
  plan.work_ns = static_cast<int64_t>(std::max(work, bytes / kBytesPerNs));
  plan.threads = threads_for(plan.work_ns, kNsPerThread, std::min<int64_t>(max_threads, plan.items.size()));
}

// The n queries or keys of sequence b in ranges of `size`, for all heads; one empty range where there are none.
void add_items(AttentionPlan& plan, int64_t b, int64_t kv_heads, int64_t n, int64_t size) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(n, size));
  for (int64_t head = 0; head < kv_heads; ++head)
    for (int64_t part = 0; part < parts; ++part)
      plan.items.push_back({b, head, part * size, std::min(n, (part + 1) * size), part});
}

}  // namespace

template <class S>
AttentionSequence attention_sequence(const AttentionParams<S>& p, int64_t b) {
  AttentionSequence s{0, p.q_len, 0, p.k_len, 0};
  if (p.q_starts) {
    s.q_begin = p.q_starts[b], s.q_len = p.q_starts[b + 1] - s.q_begin;
    s.k_begin = p.k_starts[b], s.k_len = p.k_starts[b + 1] - s.k_begin;
  }
  if (p.kv_lengths) s.k_len = p.kv_lengths[b];
  s.offset = p.lower_right ? s.k_len - s.q_len : 0;
  return s;
}

template <class S>
AttentionPlan AttentionPlan::make(const AttentionForwardParams<S>& p, int max_threads) {
  AttentionPlan plan{};
  if (p.q_heads == 0) return plan;
  const int64_t group = p.q_heads / p.kv_heads;
  plan.decode = group * p.q_len <= kDecodeRows && !p.weights;
  // Heads whose weights are averaged are one item's.
  const bool all_heads = p.weights && p.average;
  int64_t total = 0;
  for (int64_t b = 0; b < p.batch; ++b) total += attention_sequence(p, b).q_len;
  const int64_t fits = forward_values() / std::max<int64_t>(1, std::max(p.dim, p.v_dim));
  const int64_t even = ceil_div(total * (all_heads ? 1 : p.q_heads), kItemsWanted);
  // An item holds its weights for all keys.
  const int64_t weighed = std::clamp(kWeightsHeld / std::max<int64_t>(1, p.k_len), kRowsWeighed, kRowsAtLeast);
  const int64_t rows = p.weights ? std::clamp(even, kRowsWeighed, weighed)
                                 : std::clamp(even, kRowsAtLeast, std::max(fits, kRowsAtLeast));
  const int64_t queries = ceil_div(rows, std::max<int64_t>(all_heads ? 1 : group, 1));
  for (int64_t b = 0; b < p.batch; ++b) {
    const auto sequence = attention_sequence(p, b);
    if (sequence.q_len == 0) continue;
    if (plan.decode) {
      const int64_t parts = std::max<int64_t>(1, (sequence.k_len + kDecodeKeys / 2) / kDecodeKeys);
      add_items(plan, b, p.kv_heads, sequence.k_len, std::max<int64_t>(1, ceil_div(sequence.k_len, parts)));
      continue;
    }
    // Parts of equal size.
    const int64_t size = ceil_div(sequence.q_len, ceil_div(sequence.q_len, queries));
    add_items(plan, b, all_heads ? 1 : p.kv_heads, sequence.q_len, size);
    plan.most_rows = std::max(plan.most_rows, group * size);
  }
  if (plan.decode) plan.most_rows = group * p.q_len;
  estimate(plan, p, kForwardCost, 2. * (p.dim + p.v_dim), max_threads);
  return plan;
}

template <class S>
AttentionPlan AttentionPlan::make(const AttentionBackwardParams<S>& p, int max_threads) {
  AttentionPlan plan{};
  // Items whose gradients of the mask meet in one place are one item; it names the first.
  plan.all_batches = p.grad_bias.data && p.grad_bias.batch == 0;
  plan.all_heads = p.grad_bias.data && p.grad_bias.head == 0;
  const int64_t heads = plan.all_heads ? std::min<int64_t>(1, p.kv_heads) : p.kv_heads;
  const int64_t batch = plan.all_batches ? std::min<int64_t>(1, p.batch) : p.batch;
  const int64_t wanted = ceil_div(kPartsWanted, std::max<int64_t>(1, heads * batch));
  const bool whole = p.grad_bias.data && p.grad_bias.key == 0;
  int64_t most_keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) most_keys = std::max(most_keys, attention_sequence(p, b).k_len);
  // Every head gets as many parts, empty ones too, for their gradients of q are added up.
  plan.parts = whole ? 1 : std::clamp<int64_t>(most_keys / kKeysAtLeast, 1, wanted);
  plan.most_rows = std::max<int64_t>(1, ceil_div(most_keys, plan.parts));
  for (int64_t b = 0; b < batch; ++b) add_items(plan, b, heads, plan.parts * plan.most_rows, plan.most_rows);
  estimate(plan, p, kBackwardCost, 6. * p.dim + 4. * p.v_dim, max_threads);
  return plan;
}

template <class S>
void attention_forward(const AttentionForwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  const auto plan = AttentionPlan::make(p, max_threads);
  if (!plan.items.empty()) kernels<S>().attention->forward(p, plan, parallel_for);
}

template <class S>
void attention_backward(const AttentionBackwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  const auto plan = AttentionPlan::make(p, max_threads);
  if (!plan.items.empty()) kernels<S>().attention->backward(p, plan, parallel_for);
}

#define FASTLM_INSTANTIATE(S)                                                          \
  template AttentionSequence attention_sequence(const AttentionParams<S>&, int64_t);   \
  template void attention_forward(const AttentionForwardParams<S>&, int, ParallelFor); \
  template void attention_backward(const AttentionBackwardParams<S>&, int, ParallelFor)
FASTLM_INSTANTIATE(float);
FASTLM_INSTANTIATE(double);
FASTLM_INSTANTIATE(BFloat16);

}  // namespace fastlm::cpu
