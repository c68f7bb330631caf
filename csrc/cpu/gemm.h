// The product as an entry of its own, for bindings.
#pragma once

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class T>
void gemm(const GemmParams<T>& p, int max_threads, ParallelFor parallel_for);

// Whether the product of floats (m, k) and (k, n) is made by tile registers from parts of these.
bool splits_product(int64_t m, int64_t n, int64_t k);

}  // namespace fastlm::cpu
