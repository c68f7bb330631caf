// exp, sigmoid and tanh of a vector, float and double, from one scheme:
//   exp(x) = 2^n (1 + q),  n = round(x log2 e),  r = x - n ln 2 (two-part),  q = expm1(r) by a polynomial.
// Measured over the whole range against correctly rounded values (tests/simd/test_math.py): exp at most 2 ULP,
// sigmoid and tanh at most 4 ULP. Below exp's normal range the result is 0, above it +inf; NaN stays NaN.
// Polynomials: float, minimax of Cephes expf (S. Moshier, 1984-1992); double, Taylor to r^13 (truncation 4e-18).
#pragma once

#include "cpu/simd/vec.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLow = -88.02969f, kHigh = 88.9f;  // exp is 0 below, +inf above
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kTanhLimit = 9.5f;  // tanh is 1 to the last bit from here on
  static constexpr float kPoly[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLow = -709.2, kHigh = 710.;
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kTanhLimit = 20.;
  static constexpr double kPoly[] = {1. / 6227020800., 1. / 479001600., 1. / 39916800., 1. / 3628800.,
                                     1. / 362880.,     1. / 40320.,     1. / 5040.,     1. / 720.,
                                     1. / 120.,        1. / 24.,        1. / 6.,        1. / 2.};
};

template <class T>
struct ExpParts {
  Vec<T> n, q;  // exp(x) = 2^n (1 + q)
};

// x must lie within [kLow, kHigh].
template <class T>
FASTLM_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const V n = fma(x, V::broadcast(C::kLog2e), V::broadcast(C::kRound)) - V::broadcast(C::kRound);
  V r = fnma(n, V::broadcast(C::kLn2High), x);
  r = fnma(n, V::broadcast(C::kLn2Low), r);
  V p = V::broadcast(C::kPoly[0]);
  for (size_t i = 1; i < sizeof(C::kPoly) / sizeof(T); ++i) p = fma(p, r, V::broadcast(C::kPoly[i]));
  return {n, fma(p * r, r, r)};
}

// 2^n for a whole n up to kBias; 0 for n = -kBias.
template <class T>
FASTLM_INLINE Vec<T> power_of_two(Vec<T> n) {
  using C = ExpConstants<T>;
  const auto bits = (typename Vec<T>::RawInt)(n + Vec<T>::broadcast(C::kRound)).raw;
  return {(typename Vec<T>::Raw)((bits + C::kBias) << C::kMantissa)};
}

template <class T>
FASTLM_INLINE Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  const auto parts = exp_parts(clamp(x, C::kLow, C::kHigh));
  // The last octave below overflow has n = kBias + 1, whose power is no longer finite: the excess of one goes to 1 + q.
  const V capped = clamp(parts.n, static_cast<T>(-C::kBias), static_cast<T>(C::kBias));
  const V p = V::broadcast(1) + parts.q;
  return fma(p, parts.n - capped, p) * power_of_two(capped);
}

template <class T>
FASTLM_INLINE Vec<T> sigmoid(Vec<T> x) {
  const auto one = Vec<T>::broadcast(1);
  return one / (one + exp(Vec<T>{-x.raw}));
}

template <class T>
FASTLM_INLINE Vec<T> tanh(Vec<T> x) {
  const auto limit = ExpConstants<T>::kTanhLimit;
  const auto y = clamp(x, -limit, limit);
  const auto parts = exp_parts(y + y);
  const auto scale = power_of_two(parts.n);
  const auto expm1 = fma(scale, parts.q, scale - Vec<T>::broadcast(1));
  return expm1 / (expm1 + Vec<T>::broadcast(2));
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
