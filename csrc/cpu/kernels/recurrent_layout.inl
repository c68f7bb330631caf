// Buffers of the time loop, forward and backward: strides, blocks of hidden units.
#pragma once

#include "core/gates.h"
#include "cpu/kernels/gemm.inl"
#include "cpu/recurrent.h"
#include "cpu/simd/math.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// A row stride of at least n that spreads consecutive rows over the cache's sets.
template <class T>
int64_t padded(int64_t n) {
  const int64_t line = 64 / sizeof(T);
  return (n + kCols<T> - 1) / kCols<T> * kCols<T> + line;
}

template <class T>
struct RecurrentSizes {
  int64_t blocks, slots_width;  // blocks of hidden units; one row of a block's four slots
  explicit RecurrentSizes(int64_t hidden) : blocks(panels_for<T>(hidden)), slots_width(kSlots * kCols<T>) {}
};

// These rows of n values from one stride to another; from null: zeros.
template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, Team::Range rows, int64_t n) {
  for (int64_t b = rows.begin; b < rows.end; ++b)
    if (from)
      std::copy_n(from + b * from_stride, n, to + b * to_stride);
    else
      std::fill_n(to + b * to_stride, n, T(0));
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
