// Sequences of several lengths, checked and laid out for the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"

namespace fastlm::cpu {

class Sequences {
 public:
  // Tensors of (T, B) rows. Throws std::invalid_argument unless 0 <= length <= seq_len.
  static Sequences padded(const int64_t* lengths, int64_t batch, int64_t seq_len);
  // Tensors of packed rows. Throws std::invalid_argument unless sizes are positive, never grow and sum up to `rows`.
  static Sequences packed(const int64_t* batch_sizes, int64_t steps, int64_t rows);

  // Valid as long as this object.
  Ragged view() const;
  // Whether every sequence has all steps, so that there is nothing to tell a kernel.
  bool uniform() const { return uniform_; }

 private:
  // From lengths that never grow.
  explicit Sequences(const std::vector<int64_t>& lengths);

  std::vector<int64_t> first_, before_, place_, order_;
  bool uniform_ = false;
};

}  // namespace fastlm::cpu
