#include "cpu/recurrent.h"

#include "core/gates.h"
#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {
namespace {

// Chunks depend on sizes alone, never on threads, so that sums come out the same.
constexpr int64_t kForwardRows = 128;           // rows per input projection: the sums stay in L2; half of it where
                                                // two chunks' sums are kept
constexpr int64_t kBackwardBytes = 4 << 20;     // slot gradients between weight gradients: they stay in L3
constexpr int64_t kBackwardRowsAtLeast = 1024;  // a full block of k for the weight gradients
constexpr int64_t kRowsToSplit = 6;             // rows per member from which sharing the batch pays, where weights are
constexpr double kSmallWeights = 256 << 10;     // so small
constexpr int64_t kManyRowsToSplit = 16;        // rows per member from which it pays where they are larger, but fit
constexpr int64_t kBackwardRowsInPlace = 48;    // of a single step, that weights are not packed beforehand for
constexpr double kBytesPerNs = 40;              // weights from L3, one core
constexpr double kStreamNsPerThread = 5000;     // kNsPerThread where packed weights may still lie in a member's L2

// Recurrent weights that stay in a core's L2 beside the rest; at most what was measured on cores with 2 MiB.
double bytes_in_l2() { return std::clamp<double>(l2_bytes() * 3 / 4, kSmallWeights, 1 << 20); }

// Rows of some whole steps of the full batch; of steps that shrink, a chunk may take more.
int64_t chunk_rows(int64_t most, int64_t batch, int64_t steps) {
  return std::clamp<int64_t>(most / std::max<int64_t>(batch, 1), 1, std::max<int64_t>(steps, 1)) * batch;
}

// `rows_in_place`: of a single step, at most, for which weights need not be packed.
template <class Params>
RecurrentPlan make_plan(const Params& p, int gates, int64_t rows_in_place, int weight_bytes, int max_threads,
                        bool backward) {
  using T = typename Params::T;
  const int64_t rows = p.ragged ? p.ragged->first[p.ragged->steps] : p.seq_len * p.batch;
  const int64_t steps = p.ragged ? p.ragged->steps : p.seq_len;
  const double weights = static_cast<double>(gates) * p.hidden * (p.input_size + p.hidden);
  const double flops = (backward ? 4. : 2.) * rows * weights;
  // A single step with few rows waits for the weights, not for the arithmetic.
  const double bytes = weights * sizeof(T) * std::min<int64_t>(p.batch, 1) * (backward ? 2 : 1);
  RecurrentPlan plan{};
  plan.work_ns = static_cast<int64_t>(std::max(flops / kFlopsPerNs, bytes / kBytesPerNs));
  plan.threads = threads_for(plan.work_ns, kNsPerThread, max_threads);
  // Sharing the units halves the weights that a member streams through its L2 every step; where they fit anyway,
  // sharing the batch saves the barriers.
  const double state = static_cast<double>(gates) * p.hidden * p.hidden;
  const bool small = state * sizeof(T) <= kSmallWeights;
  const bool fits = small || (steps > 1 && state * weight_bytes <= bytes_in_l2());
  plan.split_batch = plan.threads == 1 || (fits && p.batch >= (small ? kRowsToSplit : kManyRowsToSplit) * plan.threads);
  plan.direct = rows <= (backward ? 6 : 16) || (steps == 1 && rows <= rows_in_place);
  plan.forward_rows = chunk_rows(plan.split_batch ? kForwardRows : kForwardRows / 2, p.batch, steps);
  const int64_t row_bytes = kSlots * p.hidden * static_cast<int64_t>(sizeof(T));
  plan.backward_rows =
      chunk_rows(std::max(kBackwardRowsAtLeast, kBackwardBytes / std::max<int64_t>(row_bytes, 1)), p.batch, steps);
  return plan;
}

template <class S>
void run_forward(const RecurrentKernels<S>& kernels, const RecurrentForwardParams<S>& p, int gates, int max_threads,
                 ParallelFor parallel_for) {
  kernels.forward(p, RecurrentPlan::make(p, gates, kernels.rows_in_place, kernels.weight_bytes, max_threads),
                  parallel_for);
}

template <class S>
void run_backward(const RecurrentKernels<S>& kernels, const RecurrentBackwardParams<S>& p, int gates, int max_threads,
                  ParallelFor parallel_for) {
  kernels.backward(p, RecurrentPlan::make(p, gates, kernels.weight_bytes, max_threads), parallel_for);
}

}  // namespace

template <class S>
RecurrentPlan RecurrentPlan::make(const RecurrentForwardParams<S>& p, int gates, int64_t rows_in_place,
                                  int weight_bytes, int max_threads) {
  return make_plan(p, gates, rows_in_place, weight_bytes, max_threads, false);
}

template <class S>
RecurrentPlan RecurrentPlan::make(const RecurrentBackwardParams<S>& p, int gates, int weight_bytes, int max_threads) {
  return make_plan(p, gates, kBackwardRowsInPlace, weight_bytes, max_threads, true);
}

template <class S>
RecurrentPlan RecurrentPlan::make_stream(const RecurrentForwardParams<S>& p, int gates, int64_t layers,
                                         int weight_bytes, int max_threads) {
  const double weights =
      static_cast<double>(gates) * p.hidden * (p.input_size + p.hidden + 2 * (layers - 1) * p.hidden);
  const double flops = 2. * p.seq_len * p.batch * weights, bytes = weights * weight_bytes * p.seq_len;
  RecurrentPlan plan{};
  plan.work_ns = static_cast<int64_t>(std::max(flops / kFlopsPerNs, bytes / kBytesPerNs));
  plan.threads = threads_for(plan.work_ns, kStreamNsPerThread, max_threads);
  plan.split_batch = plan.threads == 1;
  plan.forward_rows = chunk_rows(plan.split_batch ? kForwardRows : kForwardRows / 2, p.batch, p.seq_len);
  return plan;
}

template <class S>
void gru_forward(const RecurrentForwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  run_forward(*kernels<S>().gru, p, kGruGates, max_threads, parallel_for);
}

template <class S>
void gru_backward(const RecurrentBackwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  run_backward(*kernels<S>().gru, p, kGruGates, max_threads, parallel_for);
}

template <class S>
void lstm_forward(const RecurrentForwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  run_forward(*kernels<S>().lstm, p, kLstmGates, max_threads, parallel_for);
}

template <class S>
void lstm_backward(const RecurrentBackwardParams<S>& p, int max_threads, ParallelFor parallel_for) {
  run_backward(*kernels<S>().lstm, p, kLstmGates, max_threads, parallel_for);
}

#define FASTLM_INSTANTIATE(S)                                                                                  \
  template RecurrentPlan RecurrentPlan::make_stream(const RecurrentForwardParams<S>&, int, int64_t, int, int); \
  template void gru_forward(const RecurrentForwardParams<S>&, int, ParallelFor);                               \
  template void gru_backward(const RecurrentBackwardParams<S>&, int, ParallelFor);                             \
  template void lstm_forward(const RecurrentForwardParams<S>&, int, ParallelFor);                              \
  template void lstm_backward(const RecurrentBackwardParams<S>&, int, ParallelFor)
FASTLM_INSTANTIATE(float);
FASTLM_INSTANTIATE(double);
FASTLM_INSTANTIATE(BFloat16);

}  // namespace fastlm::cpu
