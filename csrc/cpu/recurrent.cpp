#include "cpu/recurrent.h"

#include "core/gates.h"
#include "cpu/isa.h"

namespace fastlm::cpu {
namespace {

// Chunks depend on sizes alone, never on threads, so that sums come out the same.
constexpr int64_t kForwardRows = 128;          // rows per input projection: the sums stay in L2; half of it where
                                               // two chunks' sums are kept
constexpr int64_t kBackwardBytes = 8 << 20;    // slot gradients between weight gradients: they stay in L3
constexpr int64_t kBackwardRowsAtLeast = 512;  // a full block of k for the weight gradients
constexpr int64_t kRowsToSplit = 6;            // rows per member from which sharing the batch pays
constexpr double kBytesInL2 = 256 << 10;       // recurrent weights that stay beside the rest
constexpr double kFlopsPerNs = 60;             // of one core, cautiously
constexpr double kBytesPerNs = 40;             // weights from L3, one core
constexpr double kNsPerThread = 12000;         // below this much work per member a second thread loses

int64_t chunk_steps(int64_t rows, int64_t batch, int64_t seq_len) {
  return std::clamp<int64_t>(rows / std::max<int64_t>(batch, 1), 1, std::max<int64_t>(seq_len, 1));
}

template <class T, class Params>
RecurrentPlan make_plan(const Params& p, int gates, int max_threads, bool backward) {
  const double weights = static_cast<double>(gates) * p.hidden * (p.input_size + p.hidden);
  const double flops = (backward ? 4. : 2.) * p.seq_len * p.batch * weights;
  // A step with few rows waits for the weights, not for the arithmetic.
  const double bytes = weights * sizeof(T) * std::min<int64_t>(p.batch, 1) * (backward ? 2 : 1);
  RecurrentPlan plan{};
  plan.work_ns = static_cast<int64_t>(std::max(flops / kFlopsPerNs, bytes / kBytesPerNs));
  plan.threads = std::max(1, static_cast<int>(std::min<double>(max_threads, plan.work_ns / kNsPerThread)));
  // Sharing the units halves the weights that a member streams through its L2 every step; where they fit anyway,
  // sharing the batch saves the barriers.
  const bool fits = static_cast<double>(gates) * p.hidden * p.hidden * sizeof(T) <= kBytesInL2;
  plan.split_batch = plan.threads == 1 || (fits && p.batch >= kRowsToSplit * plan.threads);
  const int64_t rows = p.seq_len * p.batch;
  plan.direct = rows <= (backward ? 6 : 16) || (p.seq_len == 1 && rows <= 48);
  plan.forward_chunk = chunk_steps(plan.split_batch ? kForwardRows : kForwardRows / 2, p.batch, p.seq_len);
  const int64_t row_bytes = kSlots * p.hidden * static_cast<int64_t>(sizeof(T));
  plan.backward_chunk =
      chunk_steps(std::max(kBackwardRowsAtLeast, kBackwardBytes / std::max<int64_t>(row_bytes, 1)), p.batch, p.seq_len);
  return plan;
}

}  // namespace

template <class T>
RecurrentPlan RecurrentPlan::make(const RecurrentForwardParams<T>& p, int gates, int max_threads) {
  return make_plan<T>(p, gates, max_threads, false);
}

template <class T>
RecurrentPlan RecurrentPlan::make(const RecurrentBackwardParams<T>& p, int gates, int max_threads) {
  return make_plan<T>(p, gates, max_threads, true);
}

template <class T>
void gru_forward(const RecurrentForwardParams<T>& p, int max_threads, ParallelFor parallel_for) {
  kernels<T>().gru->forward(p, RecurrentPlan::make(p, kGruGates, max_threads), parallel_for);
}

template <class T>
void gru_backward(const RecurrentBackwardParams<T>& p, int max_threads, ParallelFor parallel_for) {
  kernels<T>().gru->backward(p, RecurrentPlan::make(p, kGruGates, max_threads), parallel_for);
}

template <class T>
void lstm_forward(const RecurrentForwardParams<T>& p, int max_threads, ParallelFor parallel_for) {
  kernels<T>().lstm->forward(p, RecurrentPlan::make(p, kLstmGates, max_threads), parallel_for);
}

template <class T>
void lstm_backward(const RecurrentBackwardParams<T>& p, int max_threads, ParallelFor parallel_for) {
  kernels<T>().lstm->backward(p, RecurrentPlan::make(p, kLstmGates, max_threads), parallel_for);
}

#define FASTLM_INSTANTIATE(T)                                                      \
  template void gru_forward(const RecurrentForwardParams<T>&, int, ParallelFor);   \
  template void gru_backward(const RecurrentBackwardParams<T>&, int, ParallelFor); \
  template void lstm_forward(const RecurrentForwardParams<T>&, int, ParallelFor);  \
  template void lstm_backward(const RecurrentBackwardParams<T>&, int, ParallelFor)
FASTLM_INSTANTIATE(float);
FASTLM_INSTANTIATE(double);

}  // namespace fastlm::cpu
