// The product as an entry of its own, for bindings.
#pragma once

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class T>
void gemm(const GemmParams<T>& p, int max_threads, ParallelFor parallel_for);

}  // namespace fastlm::cpu
