// Entry of the output layer with its loss, for bindings, and how a call is cut.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

// Depends on sizes alone, `threads` excepted: results are the same for every number of them.
struct CrossEntropyPlan {
  int64_t parts;    // that the words are cut into, which threads share,
  int64_t items;    // or the rows, where they are more than one
  int threads;      // wanted members
  int64_t work_ns;  // rough time on one thread
};

template <class S>
void cross_entropy(const CrossEntropyParams<S>& p, int max_threads, ParallelFor parallel_for);

}  // namespace fastlm::cpu
