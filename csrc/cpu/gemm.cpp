#include "cpu/gemm.h"

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {

template <class T>
void gemm(const GemmParams<T>& p, int max_threads, ParallelFor parallel_for) {
  constexpr double kFlopsPerThread = 1e6;  // below this much work per member a second thread loses
  kernels<T>().gemm->gemm(p, threads_for(2. * p.m * p.n * p.k, kFlopsPerThread, max_threads), parallel_for);
}

bool splits_product(int64_t m, int64_t n, int64_t k) {
  GemmParams<float> p{};
  p.m = m, p.n = n, p.k = k;
  return kernels<float>().gemm->splits(p);
}

template void gemm(const GemmParams<float>&, int, ParallelFor);
template void gemm(const GemmParams<double>&, int, ParallelFor);

}  // namespace fastlm::cpu
