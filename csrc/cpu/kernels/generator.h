// Random numbers that are worked out from a place, so that backward finds them again and threads do not matter.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Dropout: a murmur3-style finaliser (A. Appleby) over the index in a row under two words per row, which come
// from the seed and the row's place by splitmix64 (Steele et al. 2014). Kept where the hash reaches the threshold.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double keep_scale;

  static Dropout make(double probability, int64_t seed) {
    const double threshold = probability * 4294967296.;
    return {static_cast<uint64_t>(seed), static_cast<uint32_t>(std::min(threshold, 4294967295.)),
            probability < 1 ? 1 / (1 - probability) : 0};
  }
  bool active() const { return threshold > 0; }

  // factors[i] for index `first + i`, i in [begin, end): 0 or keep_scale.
  template <class T>
  void factors(uint64_t row, int64_t first, int64_t begin, int64_t end, T* factors) const {
    uint64_t z = seed + 0x9e3779b97f4a7c15u * (row + 1);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const auto low = static_cast<uint32_t>(z), high = static_cast<uint32_t>(z >> 32);
    const auto scale = static_cast<T>(keep_scale);
    const uint32_t base = static_cast<uint32_t>(first) + low, limit = threshold;
    for (int64_t i = begin; i < end; ++i) {
      uint32_t x = (base + static_cast<uint32_t>(i)) * 0x85ebca6bu;
      x = ((x ^ x >> 15) + high) * 0xc2b2ae35u;
      x = (x ^ x >> 13) * 0x27d4eb2fu;
      x ^= x >> 16;
      factors[i] = x >= limit ? scale : T(0);
    }
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
