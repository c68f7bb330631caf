// Subnormal numbers, below 1.2e-38 in float, count as zero while one of these lives on its thread.
//
// Intel's processors take many times as long for them as for others, and they come by the million: a gradient that
// arrives at the last of 400 steps has become so small at the first ones that backward would take 20 times as long.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastlm::cpu {

class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kResultsToZero | kOperandsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kResultsToZero = 1u << 15, kOperandsAreZero = 1u << 6;
  const unsigned saved_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif

 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace fastlm::cpu
