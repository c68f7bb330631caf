// The SIMD functions over arrays, for accuracy sweeps.
#pragma once

#include "cpu/isa.h"
#include "cpu/simd/math.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T, Vec<T> (*kFunction)(const Vec<T>&)>
void map_values(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<T>::kLanes)
    kFunction(Vec<T>::load_partial(x + i, n - i)).store_partial(y + i, n - i);
}

extern const MathKernels<float> kMathFloat{map_values<float, exp<Vec<float>>>, map_values<float, sigmoid<Vec<float>>>,
                                           map_values<float, tanh<Vec<float>>>};
extern const MathKernels<double> kMathDouble{map_values<double, exp<Vec<double>>>,
                                             map_values<double, sigmoid<Vec<double>>>,
                                             map_values<double, tanh<Vec<double>>>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
