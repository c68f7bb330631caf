// Element types: what a tensor stores, and what its arithmetic is done in.
#pragma once

#include <cstdint>

namespace fastlm {

// The upper half of a float. Only stored: arithmetic widens it, which is exact, and rounds to nearest even.
struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using type = float;
};
// The type of sums, gates and cell states for tensors of S.
template <class S>
using Compute = typename ComputeOf<S>::type;

}  // namespace fastlm
