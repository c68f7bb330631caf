// The SIMD functions over arrays, for accuracy sweeps.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd/math.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T, class F>
void map_values(const T* x, T* y, int64_t n, const F& function) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes)
    function(Vec<T>::load_partial(x + i, n - i)).store_partial(y + i, n - i);
}

template <class T>
constexpr MathKernels<T> math_kernels() {
  using V = Vec<T>;
  return {
      [](const T* x, T* y, int64_t n) { map_values(x, y, n, [](V v) { return exp(v); }); },
      [](const T* x, T* y, int64_t n) { map_values(x, y, n, [](V v) { return exp2_nonpositive(v); }); },
      [](const T* x, T* y, int64_t n) { map_values(x, y, n, [](V v) { return sigmoid(v); }); },
      [](const T* x, T* y, int64_t n) { map_values(x, y, n, [](V v) { return tanh(v); }); },
  };
}

extern const MathKernels<float> kMathFloat = math_kernels<float>();
extern const MathKernels<double> kMathDouble = math_kernels<double>();

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
