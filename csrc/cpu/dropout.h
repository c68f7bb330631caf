// Entry of dropout for bindings.
#pragma once

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class S>
void dropout(const DropoutParams<S>& p, int max_threads, ParallelFor parallel_for);

}  // namespace fastlm::cpu
