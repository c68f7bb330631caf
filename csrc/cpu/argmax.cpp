#include "cpu/argmax.h"

#include "cpu/isa.h"

namespace fastlm::cpu {

template <class T>
std::unique_ptr<Argmax<T>> Argmax<T>::make(const ArgmaxParams<T>& params, int max_threads, ParallelFor parallel_for) {
  return std::unique_ptr<Argmax>(kernels<T>().argmax->make(params, max_threads, parallel_for));
}

template class Argmax<float>;
template class Argmax<double>;

}  // namespace fastlm::cpu
