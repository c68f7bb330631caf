#include "cpu/gelu.h"

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {

template <class S>
void gelu(const GeluParams<S>& p, int max_threads, ParallelFor parallel_for) {
  constexpr double kValuesPerThread = 8192;  // below, a second thread loses
  kernels<S>().gelu->run(p, threads_for(p.n, kValuesPerThread, max_threads), parallel_for);
}

template void gelu(const GeluParams<float>&, int, ParallelFor);
template void gelu(const GeluParams<double>&, int, ParallelFor);
template void gelu(const GeluParams<BFloat16>&, int, ParallelFor);

}  // namespace fastlm::cpu
