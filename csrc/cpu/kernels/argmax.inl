// cpu/argmax.h by screening: a copy of the weights in 8 bits, a quarter of the memory to read, bounds every logit from
// both sides, and only words whose upper bound reaches the greatest lower bound are multiplied as they are. The result
// is that of all products.
//
// With w = s q + e, |e| <= s / 2, and hidden = t i + f, |f| <= t / 2 (q of 8 bits, i of 16, one s per word):
//   |w hidden - s t q i| <= s (|hidden|_1 / 2 + 127 D t / 2).
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/argmax.h"
#include "cpu/isa.h"
#include "cpu/simd/vec.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T>
class ScreenedArgmax final : public Argmax<T> {
 public:
  ScreenedArgmax(const ArgmaxParams<T>& params, int max_threads, ParallelFor parallel_for)
      : p_(params), stride_((params.dim + kUnit - 1) / kUnit * kUnit) {
    take();
    memory_.allocate_lasting();
    take();
    const int threads = static_cast<int>(std::min<double>(max_threads, 1 + p_.vocab * stride_ / kValuesPerThread));
    run_team(parallel_for, threads, p_.vocab * stride_ / 4, [&](const Team& team) {
      const auto own = team.split(p_.vocab);
      for (int64_t word = own.begin; word < own.end; ++word) narrow(word);
    });
  }

  int64_t run(const T* hidden, int max_threads, ParallelFor parallel_for) override {
    const Bound bound = narrow_hidden(hidden);
    const int threads = static_cast<int>(std::min<double>(max_threads, 1 + p_.vocab * stride_ / kValuesPerThread));
    std::vector<Best> best(threads);
    run_team(parallel_for, threads, p_.vocab * stride_ / 16,
             [&](const Team& team) { best[team.rank] = search(hidden, bound, team.split(p_.vocab)); });
    for (const Best& other : best)
      if (other.beats(best[0])) best[0] = other;
    return best[0].word;
  }

 private:
  static constexpr int64_t kUnit = 64;  // values that a row is filled up to
  static constexpr int kMost = 127;     // of a weight in 8 bits
  static constexpr int64_t kValuesPerThread = 200000;

  struct Best {
    T logit = -std::numeric_limits<T>::infinity();
    int64_t word = 0;
    bool beats(const Best& other) const {
      return logit > other.logit || (logit != logit && other.logit == other.logit);
    }
  };
  struct Bound {
    T unit;    // t
    T spread;  // of a logit, for s = 1; not finite: nothing is known
  };

  void take() {
    values_ = memory_.template take<int8_t>(p_.vocab * stride_);
    units_ = memory_.template take<T>(p_.vocab);
    scores_ = memory_.template take<T>(p_.vocab);
    hidden_ = memory_.template take<int16_t>(stride_);
  }

  void narrow(int64_t word) {
    const T* row = p_.weight + word * p_.dim;
    const auto [most, sum] = magnitudes(row);
    const bool finite = std::isfinite(sum);
    units_[word] = finite ? most / kMost : std::numeric_limits<T>::quiet_NaN();  // then it is always multiplied
    to_integers(row, finite && most > 0 ? kMost / most : T(0), finite, values_ + word * stride_);
  }

  Bound narrow_hidden(const T* hidden) {
    const auto [most, sum] = magnitudes(hidden);
    const bool finite = std::isfinite(sum);
    const auto limit = static_cast<T>(std::min<int64_t>(32767, (int64_t{1} << 31) / (kMost * stride_) - 1));
    to_integers(hidden, finite && most > 0 ? limit / most : T(0), finite, hidden_);
    if (!finite) return {T(0), std::numeric_limits<T>::quiet_NaN()};
    const T unit = most / limit;
    // A hundredth more, for what rounding adds in here and in the products themselves.
    return {unit, T(0.505) * (sum + kMost * static_cast<T>(p_.dim) * unit)};
  }

  struct Magnitudes {
    T most, sum;
  };
  Magnitudes magnitudes(const T* row) const {
    using V = Vec<T>;
    V most = V::zero(), sum = V::zero();
    for (int64_t i = 0; i < p_.dim; i += V::kLanes) {
      const V value = V::load_partial(row + i, p_.dim - i), magnitude = at_least(-value, value);
      most = at_least(most, magnitude), sum = sum + magnitude;
    }
    Magnitudes all{0, 0};
    for (int i = 0; i < V::kLanes; ++i) all.most = std::max(all.most, most.raw[i]), all.sum += sum.raw[i];
    return all;
  }

  // Rounded, and filled up with zeros; `factor` keeps them in range.
  template <class I>
  void to_integers(const T* row, T factor, bool finite, I* to) const {
    const int64_t known = finite ? p_.dim : 0;
    std::fill(to + known, to + stride_, I(0));
    for (int64_t i = 0; i < known; ++i) {
      const T value = row[i] * factor;
      to[i] = static_cast<I>(static_cast<int32_t>(value + (value < 0 ? T(-0.5) : T(0.5))));
    }
  }

  // What is taken for the products of a row; exact, for the sum stays below 2^31.
  int32_t multiply(const int8_t* row) const {
    int32_t sum = 0;
    for (int64_t i = 0; i < stride_; ++i) sum += static_cast<int16_t>(row[i]) * hidden_[i];
    return sum;
  }

  T logit(int64_t word, const T* hidden) const {
    using V = Vec<T>;
    constexpr int kChains = 4;
    const T* row = p_.weight + word * p_.dim;
    V sums[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < p_.dim; i += kChains * V::kLanes)
      unrolled<kChains>([&](int j) FASTLM_LAMBDA_INLINE {
        const int64_t at = i + j * V::kLanes, left = p_.dim - at;
        if (left > 0) sums[j] = fma(V::load_partial(row + at, left), V::load_partial(hidden + at, left), sums[j]);
      });
    return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + bias(word);
  }
  T bias(int64_t word) const { return p_.bias ? p_.bias[word] : T(0); }

  // How far a logit can be from its score: by its products, and by what their sum with the bias is rounded by.
  T spread(int64_t word, const Bound& bound) const {
    return units_[word] * bound.spread + 4 * std::numeric_limits<T>::epsilon() * std::abs(scores_[word]);
  }

  Best search(const T* hidden, const Bound& bound, Team::Range words) {
    T least = -std::numeric_limits<T>::infinity();  // that the greatest logit can be
    for (int64_t word = words.begin; word < words.end; ++word) {
      scores_[word] = bias(word) + units_[word] * (bound.unit * static_cast<T>(multiply(values_ + word * stride_)));
      const T low = scores_[word] - spread(word, bound);
      least = low > least ? low : least;
    }
    Best best{-std::numeric_limits<T>::infinity(), words.begin};
    for (int64_t word = words.begin; word < words.end; ++word) {
      if (scores_[word] + spread(word, bound) < least) continue;  // what is not known is not below
      const Best other{logit(word, hidden), word};
      if (other.beats(best)) best = other;
    }
    return best;
  }

  const ArgmaxParams<T> p_;
  const int64_t stride_;
  Workspace memory_;
  int8_t* values_ = nullptr;                // q, [word][stride]
  T *units_ = nullptr, *scores_ = nullptr;  // s and the logits as q and i give them
  int16_t* hidden_ = nullptr;               // i
};

template <class T>
Argmax<T>* make_argmax(const ArgmaxParams<T>& params, int max_threads, ParallelFor parallel_for) {
  return new ScreenedArgmax<T>(params, max_threads, parallel_for);
}

extern const ArgmaxKernels<float> kArgmaxFloat{make_argmax<float>};
extern const ArgmaxKernels<double> kArgmaxDouble{make_argmax<double>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
