#include "cpu/dropout.h"

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {

template <class S>
void dropout(const DropoutParams<S>& p, int max_threads, ParallelFor parallel_for) {
  constexpr double kValuesPerThread = 16384;  // below, a second thread loses
  kernels<S>().dropout->run(p, threads_for(p.n, kValuesPerThread, max_threads), parallel_for);
}

template void dropout(const DropoutParams<float>&, int, ParallelFor);
template void dropout(const DropoutParams<double>&, int, ParallelFor);
template void dropout(const DropoutParams<BFloat16>&, int, ParallelFor);

}  // namespace fastlm::cpu
