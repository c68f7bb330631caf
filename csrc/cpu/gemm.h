// The product as an entry of its own, for bindings.
#pragma once

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class T>
void gemm(const GemmParams<T>& p, int max_threads, ParallelFor parallel_for);

// Whether the product of floats (m, k) and (k, n), stored transposed where the flags say so, takes less time than
// MKL's.
bool product_is_faster(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed);

}  // namespace fastlm::cpu
