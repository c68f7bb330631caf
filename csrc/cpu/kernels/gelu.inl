// GELU by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415), written with the sigmoid, which keeps all digits where the
// result is small: x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
#pragma once

#include "cpu/isa.h"
#include "cpu/simd/math.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class V>
struct GeluParts {
  V share, slope;  // sigmoid(2 u), and the derivative of 2 u
};
template <class V>
FASTLM_INLINE GeluParts<V> gelu_parts(const V& x) {
  using T = typename V::Scalar;
  constexpr T kLinear = T(1.5957691216057307), kCubic = T(0.044715) * kLinear;  // 2 sqrt(2 / pi)
  const V square = x * x;
  const V twice_u = x * fma(square, V::broadcast(kCubic), V::broadcast(kLinear));
  return {sigmoid(twice_u), fma(square, V::broadcast(3 * kCubic), V::broadcast(kLinear))};
}

// Of n <= kLanes values.
template <class V, class S>
FASTLM_INLINE void gelu_lanes(const GeluParams<S>& p, int64_t i, int64_t n) {
  const V x = load_as<V>(p.x + i, n);
  const auto parts = gelu_parts(x);
  if (!p.grad_output) return store_as(x * parts.share, p.result + i, n);
  // d(x s) = s + x s (1 - s) (2 u)'
  const V rest = parts.share * (V::broadcast(1) - parts.share);
  store_as(load_as<V>(p.grad_output + i, n) * fma(x * rest, parts.slope, parts.share), p.result + i, n);
}

template <class S>
void gelu(const GeluParams<S>& p, int threads, ParallelFor parallel_for) {
  using T = Compute<S>;
  using Wide = Pack<T, 2>;
  constexpr int64_t kUnit = 64;  // of a cache line's values, so that no two members write one
  run_team(parallel_for, threads, p.n, [&](const Team& team) {
    const auto own = team.split(p.n, kUnit);
    int64_t i = own.begin;
    for (; i + Wide::kLanes <= own.end; i += Wide::kLanes) gelu_lanes<Wide>(p, i, Wide::kLanes);
    for (; i < own.end; i += Vec<T>::kLanes) gelu_lanes<Vec<T>>(p, i, own.end - i);
  });
}

extern const GeluKernels<float> kGeluFloat{gelu<float>};
extern const GeluKernels<double> kGeluDouble{gelu<double>};
extern const GeluKernels<BFloat16> kGeluBFloat16{gelu<BFloat16>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
