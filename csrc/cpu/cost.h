// How many threads a call is worth, by rough costs on one core.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastlm::cpu {

constexpr double kFlopsPerNs = 60;      // cautiously
constexpr double kNsPerThread = 12000;  // below this much work per member a second thread loses

// Of at most so many threads, as many as have `per_thread` of the work each; one at least.
inline int threads_for(double work, double per_thread, int64_t most) {
  return static_cast<int>(std::clamp<double>(work / per_thread, 1, static_cast<double>(std::max<int64_t>(most, 1))));
}

}  // namespace fastlm::cpu
