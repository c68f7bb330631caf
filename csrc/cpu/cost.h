// What a core does and holds, roughly, and so how many threads a call is worth.
#pragma once

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>

namespace fastlm::cpu {

constexpr double kFlopsPerNs = 60;      // cautiously
constexpr double kNsPerThread = 12000;  // below this much work per member a second thread loses

// Of at most so many threads, as many as have `per_thread` of the work each; one at least.
inline int threads_for(double work, double per_thread, int64_t most) {
  return static_cast<int>(std::clamp<double>(work / per_thread, 1, static_cast<double>(std::max<int64_t>(most, 1))));
}

// Of one core's L2, where the system tells; large ones tend to be shared by several cores. Else 0.
inline int64_t l2_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return std::max<int64_t>(bytes, 0);
#else
  return 0;
#endif
}

}  // namespace fastlm::cpu
