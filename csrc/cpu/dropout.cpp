#include "cpu/dropout.h"

#include <algorithm>

#include "cpu/isa.h"

namespace fastlm::cpu {

template <class S>
void dropout(const DropoutParams<S>& p, int max_threads, ParallelFor parallel_for) {
  constexpr int64_t kValuesPerThread = 16384;  // below, a second thread loses
  const auto threads = std::clamp<int64_t>(p.n / kValuesPerThread, 1, max_threads);
  kernels<S>().dropout->run(p, static_cast<int>(threads), parallel_for);
}

template void dropout(const DropoutParams<float>&, int, ParallelFor);
template void dropout(const DropoutParams<double>&, int, ParallelFor);
template void dropout(const DropoutParams<BFloat16>&, int, ParallelFor);

}  // namespace fastlm::cpu
