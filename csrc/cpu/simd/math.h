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
  static constexpr float kMinusLn2High = -0.693359375f, kMinusLn2Low = 2.12194440e-4f;
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
  static constexpr double kMinusLn2High = -0.693145751953125, kMinusLn2Low = -1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.;  // 1.5 * 2^52
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kTanhLimit = 20.;
  static constexpr double kPoly[] = {1. / 6227020800., 1. / 479001600., 1. / 39916800., 1. / 3628800.,
                                     1. / 362880.,     1. / 40320.,     1. / 5040.,     1. / 720.,
                                     1. / 120.,        1. / 24.,        1. / 6.,        1. / 2.};
};

// Polynomials: float, minimax of Cephes exp2f; double, Taylor to r^13 (truncation 5e-18). 2^kLow counts as 0.
template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kLow = -127.f;
  static constexpr float kPoly[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                                    5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kLow = -1023.;
  static constexpr double kPoly[] = {1.3691488853904124e-12, 2.5678435993488196e-11, 4.4455382718708101e-10,
                                     7.0549116208011209e-09, 1.0178086009239696e-07, 1.3215486790144305e-06,
                                     1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
                                     0.0096181291076284769,  0.055504108664821576,   0.24022650695910069,
                                     0.69314718055994529};
};

// All functions take a vector or a pack of them (V).
template <class V>
struct ExpParts {
  V n, q;   // exp(x) = 2^n (1 + q)
  V power;  // 2^n: 0 for n = -kBias, +inf for n = kBias + 1
};

// 2^n for n + kRound: its low bits hold n.
template <class T>
FASTLM_INLINE Vec<T> power_of_two(Vec<T> n_and_round) {
  using C = ExpConstants<T>;
  using Int = typename Vec<T>::Int;
  const auto bits = (typename Vec<T>::RawInt)n_and_round.raw;
  return {(typename Vec<T>::Raw)((bits << C::kMantissa) + (Int(C::kBias) << C::kMantissa))};
}
template <class T, int N>
FASTLM_INLINE Pack<T, N> power_of_two(const Pack<T, N>& n_and_round) {
  return Pack<T, N>::each([&](int i) FASTLM_LAMBDA_INLINE { return power_of_two(n_and_round.parts[i]); });
}

// x must lie within [kLow, kHigh].
template <class V>
FASTLM_INLINE ExpParts<V> exp_parts(const V& x) {
  using C = ExpConstants<typename V::Scalar>;
  const V n_and_round = fma(x, V::broadcast(C::kLog2e), V::broadcast(C::kRound));
  const V n = n_and_round - V::broadcast(C::kRound);
  V r = fma(n, V::broadcast(C::kMinusLn2High), x);
  r = fma(n, V::broadcast(C::kMinusLn2Low), r);
  V p = V::broadcast(C::kPoly[0]);
  for (size_t i = 1; i < sizeof(C::kPoly) / sizeof(C::kPoly[0]); ++i) p = fma(p, r, V::broadcast(C::kPoly[i]));
  return {n, fma(p * r, r, r), power_of_two(n_and_round)};
}

template <class V>
FASTLM_INLINE V exp(const V& x) {
  using C = ExpConstants<typename V::Scalar>;
  const auto parts = exp_parts(clamp(x, C::kLow, C::kHigh));
  // The last octave below overflow has n = kBias + 1, whose power is no longer finite: the excess of one goes to 1 + q.
  const V capped = clamp(parts.n, -C::kBias, C::kBias);
  const V p = V::broadcast(1) + parts.q;
  return fma(p, parts.n - capped, p) * power_of_two(capped + V::broadcast(C::kRound));
}

// 2^r = 1 + r P(r) for |r| <= 1/2.
template <class V>
FASTLM_INLINE V exp2_fraction(const V& r) {
  using C = Exp2Constants<typename V::Scalar>;
  V p = V::broadcast(C::kPoly[0]);
  for (size_t i = 1; i < sizeof(C::kPoly) / sizeof(C::kPoly[0]); ++i) p = fma(p, r, V::broadcast(C::kPoly[i]));
  return fma(p, r, V::broadcast(1));
}

// 2^x for x <= 0, -inf and NaN: fewer steps than exp, at most 2 ULP; 0 below the normal range. x = n + r.
template <class V>
FASTLM_INLINE V exp2_nonpositive(const V& x) {
  using T = typename V::Scalar;
  const V held = at_least(V::broadcast(Exp2Constants<T>::kLow), x);
  const V n_and_round = held + V::broadcast(ExpConstants<T>::kRound);
  const V r = held - (n_and_round - V::broadcast(ExpConstants<T>::kRound));
  return exp2_fraction(r) * power_of_two(n_and_round);
}
#if FASTLM_FMA_BYTES == 64
// With instructions for r and for times 2^n. Subnormal numbers would slow the products that follow.
FASTLM_INLINE Vec<float> fraction(Vec<float> x) { return {_mm512_maskz_reduce_ps(0xffff, x.raw, 0)}; }
FASTLM_INLINE Vec<float> scaled(Vec<float> p, Vec<float> n) {
  const auto normal = _mm512_cmp_ps_mask(n.raw, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, p.raw, n.raw)};
}
template <int N>
FASTLM_INLINE Pack<float, N> fraction(const Pack<float, N>& x) {
  return Pack<float, N>::each([&](int i) FASTLM_LAMBDA_INLINE { return fraction(x.parts[i]); });
}
template <int N>
FASTLM_INLINE Pack<float, N> scaled(const Pack<float, N>& p, const Pack<float, N>& n) {
  return Pack<float, N>::each([&](int i) FASTLM_LAMBDA_INLINE { return scaled(p.parts[i], n.parts[i]); });
}
FASTLM_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
  const auto r = fraction(x);
  return scaled(exp2_fraction(r), x - r);
}
template <int N>
FASTLM_INLINE Pack<float, N> exp2_nonpositive(const Pack<float, N>& x) {
  const auto r = fraction(x);
  return scaled(exp2_fraction(r), x - r);
}
#endif

template <class V>
FASTLM_INLINE V sigmoid(const V& x) {
  using C = ExpConstants<typename V::Scalar>;
  const auto one = V::broadcast(1);
  const auto parts = exp_parts(clamp(-x, C::kLow, C::kHigh));
  // An infinite power, exp's last octave, is right here: the result there is below the normal range.
  return one / fma(one + parts.q, parts.power, one);
}

template <class V>
FASTLM_INLINE V tanh(const V& x) {
  const auto limit = ExpConstants<typename V::Scalar>::kTanhLimit;
  const auto y = clamp(x, -limit, limit);
  const auto parts = exp_parts(y + y);
  const auto expm1 = fma(parts.power, parts.q, parts.power - V::broadcast(1));
  return expm1 / (expm1 + V::broadcast(2));
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
