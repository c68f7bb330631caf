#include "cpu/gemm.h"

#include "cpu/cost.h"
#include "cpu/isa.h"

namespace fastlm::cpu {

template <class T>
void gemm(const GemmParams<T>& p, int max_threads, ParallelFor parallel_for) {
  constexpr double kFlopsPerThread = 1e6;  // below this much work per member a second thread loses
  kernels<T>().gemm->gemm(p, threads_for(2. * p.m * p.n * p.k, kFlopsPerThread, max_threads), parallel_for);
}

bool product_is_faster(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed) {
  GemmParams<float> p{};
  p.m = m, p.n = n, p.k = k;
  if (kernels<float>().gemm->splits(p)) return m >= 512 && m * n * k >= 1 << 26;
  if (!outruns_mkl()) return false;
  // Of the three products of a linear layer, forward's is ahead soonest; those of the gradients cut and copy more.
  const int64_t rows = a_transposed ? k : m, weights = n * (a_transposed ? m : k);
  if (a_transposed || !b_transposed) return rows >= 8 && weights >= 1 << 19;
  return weights >= 1 << 17 ? rows * weights >= 3 << 19 : weights >= 1 << 16 && rows >= 1024;
}

template void gemm(const GemmParams<float>&, int, ParallelFor);
template void gemm(const GemmParams<double>&, int, ParallelFor);

}  // namespace fastlm::cpu
