#include "cpu/gelu.h"

#include <algorithm>

#include "cpu/isa.h"

namespace fastlm::cpu {

template <class S>
void gelu(const GeluParams<S>& p, int max_threads, ParallelFor parallel_for) {
  constexpr int64_t kValuesPerThread = 8192;  // below, a second thread loses
  const auto threads = std::clamp<int64_t>(p.n / kValuesPerThread, 1, max_threads);
  kernels<S>().gelu->run(p, static_cast<int>(threads), parallel_for);
}

template void gelu(const GeluParams<float>&, int, ParallelFor);
template void gelu(const GeluParams<double>&, int, ParallelFor);
template void gelu(const GeluParams<BFloat16>&, int, ParallelFor);

}  // namespace fastlm::cpu
