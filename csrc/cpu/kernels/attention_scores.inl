// What a query sees, and what becomes of its products with the keys: the part of attention that forward, decoding and
// backward share.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/attention.h"
#include "cpu/kernels/generator.h"
#include "cpu/kernels/operands.inl"
#include "cpu/simd/math.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// A range of keys.
struct Keys {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  Keys clipped(int64_t from, int64_t to) const { return {std::max(begin, from), std::min(end, to)}; }
  Keys less(int64_t first) const { return {begin - first, end - first}; }  // counted from `first`
};

// What some queries see; `masked`: a mask may hide some of it from some of them.
struct Seen {
  Keys keys;
  bool masked;
};

// Runs body(V, i) for vectors of T from begin to end, several at a time where there are enough; never fewer than
// kLeast.
template <class T, int kLeast = 1, class Body>
FASTLM_INLINE void for_vectors(int64_t begin, int64_t end, const Body& body) {
  using Few = std::conditional_t<kLeast == 1, Vec<T>, Pack<T, kLeast>>;
  using Four = Pack<T, 4>;
  int64_t i = begin;
  for (; i + Four::kLanes <= end; i += Four::kLanes) body(Four{}, i);
  for (; i < end; i += Few::kLanes) body(Few{}, i);
}

// row[i] becomes `value` for those i in [begin, end), whole vectors, that are not in `own`. Vectors are written whole:
// a load waits long for one that was written in parts.
template <class T>
void fill_outside(T* row, int64_t begin, int64_t end, Keys own, T value) {
  using V = Vec<T>;
  const auto fill = [&](int64_t i) FASTLM_LAMBDA_INLINE {
    replace_outside(V::load(row + i), own.begin - i, own.end - i, value).store(row + i);
  };
  int64_t i = begin;
  for (; i < std::min(own.begin, end); i += V::kLanes) fill(i);
  for (i = std::max(i, lanes_down<T>(own.end)); i < end; i += V::kLanes) fill(i);
}

// The queries of one head of one sequence.
template <class S>
class HeadScores {
 public:
  using T = Compute<S>;
  using V = Vec<T>;

  HeadScores(const AttentionParams<S>& p, const AttentionSequence& sequence, int64_t b, int64_t head)
      : p_(p), sequence_(sequence) {
    if (p.keep.data) keep_ = p.keep.data + b * p.keep.batch + head * p.keep.head;
    if (p.bias.data) bias_ = p.bias.data + b * p.bias.batch + head * p.bias.head;
    if (p.slopes.data) slope_ = p.slopes.data[b * p.slopes.batch + head * p.slopes.head];
    scaled_ = !bias_ && !p.slopes.data && p.softcap == 0 && p.scale > 0;
  }

  // Whether nothing is left for transform() to do.
  bool plain(bool masked) const { return scaled_ && !masked; }
  // From products, or from what transform() made of them, to scores; to exponents of 2, a cheaper exponential.
  T scale() const { return scaled_ ? p_.scale : T(1); }
  T factor() const { return scale() * ExpConstants<T>::kLog2e; }

  // Mask apart.
  Keys seen(int64_t query) const {
    const int64_t position = query + sequence_.offset, n = sequence_.k_len;
    Keys keys{0, n};
    if (p_.left >= 0) keys.begin = std::clamp<int64_t>(position - p_.left, 0, n);
    if (p_.right >= 0) keys.end = std::clamp<int64_t>(position + p_.right + 1, keys.begin, n);
    return keys;
  }
  // What queries [begin, end) see of the keys from `first` to `last`; both ends of what one sees rise with it.
  Seen seen(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const Keys keys = Keys{seen(begin).begin, seen(end - 1).end}.clipped(first, last);
    return keep_ && !keys.empty() ? kept(begin, end, keys) : Seen{keys, false};
  }

  // Products with the keys `first` + [keys.begin, keys.end) become scores, to whole vectors. `capped` (or null) gets
  // them as softcap left them.
  void transform(int64_t query, int64_t first, Keys keys, bool masked, T* s, T* capped) const {
    const auto scale = p_.scale, cap = p_.softcap;
    const S* bias = bias_ ? bias_ + query * p_.bias.query + first * p_.bias.key : nullptr;
    const bool* keep = masked ? keep_ + query * p_.keep.query + first * p_.keep.key : nullptr;
    if (scaled_) return mask(keep, keys, s);
    if (bias && p_.bias.key == 1 && cap == 0 && !p_.slopes.data) {  // as most models have it: one pass, the same bits
      for (int64_t i = keys.begin; i < keys.end; i += V::kLanes) {
        __builtin_prefetch(bias + kRowsAhead * p_.bias.query + i);  // pieces of rows far apart, as of a mask
        const int64_t n = std::min<int64_t>(V::kLanes, keys.end - i);
        (V::load_partial(s + i, n) * V::broadcast(scale) + load_as<V>(bias + i, n)).store_partial(s + i, n);
      }
      if (keep) mask(keep, keys, s);
      return;
    }
    const int64_t begin = lanes_down<T>(keys.begin), end = lanes_up<T>(keys.end);
    for (int64_t i = begin; i < end; i += V::kLanes) {
      V x = V::load(s + i) * V::broadcast(scale);
      if (cap != 0) {
        x = V::broadcast(cap) * tanh(x * V::broadcast(1 / cap));
        if (capped) x.store(capped + i);
      }
      x.store(s + i);
    }
    if (p_.slopes.data) add_alibi(first - query - sequence_.offset, begin, end, s);
    for (int64_t i = keys.begin; bias && i < keys.end; ++i) s[i] += widen(bias[i * p_.bias.key]);
    if (keep) mask(keep, keys, s);
  }

 private:
  void add_alibi(int64_t distance, int64_t begin, int64_t end, T* s) const {
    for (int64_t i = begin; i < end; ++i) s[i] -= slope_ * static_cast<T>(std::abs(distance + i));
  }
  void mask(const bool* keep, Keys keys, T* s) const {
    constexpr T kOut = -std::numeric_limits<T>::infinity();
    if (p_.keep.key != 1) {
      for (int64_t i = keys.begin; i < keys.end; ++i) s[i] = keep[i * p_.keep.key] ? s[i] : kOut;
      return;
    }
    for (int64_t i = lanes_down<T>(keys.begin); i < keys.end; i += V::kLanes) {
      if (i >= keys.begin && i + V::kLanes <= keys.end) {
        if (i + kAtOnce <= keys.end && all<kAtOnce>(keep + i))
          i += kAtOnce - V::kLanes;  // nothing to write, which loads of whole vectors would wait for
        else
          replace_where_not(keep + i, V::load(s + i), kOut).store(s + i);
        continue;
      }
      bool lanes[V::kLanes], whole = true;
      for (int64_t j = 0; j < V::kLanes; ++j) {
        lanes[j] = i + j < keys.begin || i + j >= keys.end || keep[i + j];
        whole &= lanes[j];
      }
      if (!whole) replace_where_not(lanes, V::load(s + i), kOut).store(s + i);
    }
  }
  // The keys without those at either end that the mask hides from all of these queries.
  Seen kept(int64_t begin, int64_t end, Keys keys) const {
    const int64_t rows = p_.keep.query ? end - begin : 1, step = p_.keep.key;
    Keys found{keys.end, keys.begin};
    for (int64_t r = 0; r < rows; ++r) {
      const bool* keep = keep_ + (begin + r) * p_.keep.query;
      // Short pieces of rows far apart: no prefetcher follows.
      for (int64_t n = keys.begin; step == 1 && n < keys.end; n += 64)
        __builtin_prefetch(keep + kRowsAhead * p_.keep.query + n);
      int64_t i = keys.begin, j = keys.end;
      while (step == 1 && i + kAtOnce <= found.begin && !any<kAtOnce>(keep + i)) i += kAtOnce;
      while (step == 1 && i + 8 <= found.begin && !any<8>(keep + i)) i += 8;
      while (i < found.begin && !keep[i * step]) ++i;
      found.begin = std::min(found.begin, i);
      const int64_t least = std::max(found.end, i);
      while (step == 1 && j - kAtOnce >= least && !any<kAtOnce>(keep + j - kAtOnce)) j -= kAtOnce;
      while (step == 1 && j - 8 >= least && !any<8>(keep + j - 8)) j -= 8;
      while (j > least && !keep[(j - 1) * step]) --j;
      if (j > i) found.end = std::max(found.end, j);
    }
    bool masked = false;
    for (int64_t r = 0; r < rows && !masked; ++r)
      masked = step != 1 || !all(keep_ + (begin + r) * p_.keep.query, found.begin, found.end);
    return {found, masked};
  }
  static constexpr int64_t kAtOnce = 64;
  template <int64_t N>
  static bool any(const bool* keep) {
    uint64_t words[N / 8], found = 0;
    memcpy(words, keep, N);
    for (const uint64_t word : words) found |= word;
    return found != 0;
  }
  template <int64_t N>
  static bool all(const bool* keep) {
    constexpr uint64_t kTrue = 0x0101010101010101;
    uint64_t words[N / 8], found = kTrue;
    memcpy(words, keep, N);
    for (const uint64_t word : words) found &= word;
    return found == kTrue;
  }
  static bool all(const bool* keep, int64_t begin, int64_t end) {
    int64_t i = begin;
    while (i + kAtOnce <= end && all<kAtOnce>(keep + i)) i += kAtOnce;
    while (i + 8 <= end && all<8>(keep + i)) i += 8;
    while (i < end && keep[i]) ++i;
    return i >= end;
  }

  const AttentionParams<S>& p_;
  const AttentionSequence& sequence_;
  const bool* keep_ = nullptr;
  const S* bias_ = nullptr;
  T slope_ = 0;
  bool scaled_;
};

// Whether 2^(factor (s - top)) may be taken in one multiply-add, which rounds by the size of factor times top. Scores
// may be as large as a mask's numbers and apart by little: then the distance is taken first.
template <class T>
bool is_small(T top, T factor) {
  return std::abs(top * factor) <= 32;
}

// What rounding takes from factor times top.
template <class T>
T rounded_off(T top, T factor) {
  return std::fma(top, factor, -(top * factor));
}

// 2^(factor (s - top)) of V at s, where s <= top but for rounding; `rest` is what the exponents of all lack.
template <class V, class T>
FASTLM_INLINE V exponential(const T* s, T factor, T top, bool small, T rest = 0) {
  if (small)
    return exp2_nonpositive(fma(V::load(s), V::broadcast(factor), V::broadcast(-(top * factor))) - V::broadcast(rest));
  const V exponent = (V::load(s) - V::broadcast(top)) * V::broadcast(factor) - V::broadcast(rest);
  return exp2_nonpositive(at_most(V::broadcast(0), exponent));
}
// What such powers are to be multiplied with when `top` becomes `higher`.
template <class T>
T rescaling(T top, T higher, T factor) {
  const bool small = is_small(top, factor) && is_small(higher, factor);
  return std::exp2(small ? top * factor - higher * factor : (top - higher) * factor);
}

// The online softmax of one query (Milakov and Gimelshein 2018): the largest of what scale() makes scores of, and the
// sum of exponentials so far.
template <class T>
struct Softmax {
  T max, sum;

  static Softmax start() { return {-std::numeric_limits<T>::infinity(), T(0)}; }

  // Takes in s[i] for i in `own`, which is not empty; write(e, i) gets the packs and the runs of kLeast vectors that
  // hold `own`, e = 2^(factor (s[i] - max)), 0 outside of it. Returns what the sums so far are to be multiplied with.
  template <int kLeast = 1, class Write>
  T add(T* s, Keys own, T factor, const Write& write) {
    using V = Vec<T>;
    constexpr T kOut = -std::numeric_limits<T>::infinity();
    constexpr int64_t kRun = kLeast * V::kLanes;
    const int64_t from = own.begin / kRun * kRun, to = (own.end + kRun - 1) / kRun * kRun;
    fill_outside(s, from, to, own, kOut);
    const T here = top(s, from, to), before = max;
    if (!(here <= max)) max = here;  // NaN too
    const T highest = max == kOut ? T(0) : max;
    const bool small = is_small(highest, factor);
    V sums[2] = {V::zero(), V::zero()};
    for_vectors<T, kLeast>(from, to, [&](auto kind, int64_t at) FASTLM_LAMBDA_INLINE {
      using W = decltype(kind);
      const W e = exponential<W>(s + at, factor, highest, small);
      write(e, at);
      if constexpr (W::kParts > 1)
        unrolled<W::kParts>([&](int j) FASTLM_LAMBDA_INLINE { sums[j % 2] = sums[j % 2] + e.parts[j]; });
      else
        sums[0] = sums[0] + e;
    });
    const T earlier = before == max || before == kOut ? T(1) : rescaling(before, max, factor);  // nothing before kOut
    sum = sum * earlier + total(sums[0] + sums[1]);
    return earlier;
  }

  // Natural logarithm of the sum of exponentials of scores; backward feels each rounding of it in a whole row.
  T lse(T scale, T factor) const {
    if (sum == 0) return -std::numeric_limits<T>::infinity();
    const T rest = is_small(max, factor) ? rounded_off(max, factor) / ExpConstants<T>::kLog2e : T(0);
    return std::fma(max, scale, std::log(sum) - rest);
  }

 private:
  static T top(const T* s, int64_t begin, int64_t end) {
    using V = Vec<T>;
    V tops[4];
    unrolled<4>([&](int j) FASTLM_LAMBDA_INLINE { tops[j] = V::broadcast(-std::numeric_limits<T>::infinity()); });
    int64_t i = begin;
    for (; i + 4 * V::kLanes <= end; i += 4 * V::kLanes)
      unrolled<4>([&](int j) FASTLM_LAMBDA_INLINE { tops[j] = at_least(tops[j], V::load(s + i + j * V::kLanes)); });
    for (; i < end; i += V::kLanes) tops[0] = at_least(tops[0], V::load(s + i));
    return largest(at_least(at_least(tops[0], tops[1]), at_least(tops[2], tops[3])));
  }
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
