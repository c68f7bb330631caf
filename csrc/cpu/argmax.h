// The greatest logit of an output layer, for one row of hidden after another and weights that stay as they are.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/team.h"

namespace fastlm::cpu {

template <class T>
struct ArgmaxParams {
  int64_t vocab, dim;
  const T* weight;  // (V, D), the caller's as long as the object lives
  const T* bias;    // (V) or null, likewise
};

template <class T>
class Argmax {
 public:
  static std::unique_ptr<Argmax> make(const ArgmaxParams<T>& params, int max_threads, ParallelFor parallel_for);
  virtual ~Argmax() = default;

  // The first v with the greatest weight[v] hidden + bias[v], hidden (D); NaN counts as greatest. Not from two threads
  // at a time.
  virtual int64_t run(const T* hidden, int max_threads, ParallelFor parallel_for) = 0;
};

}  // namespace fastlm::cpu
