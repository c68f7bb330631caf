// GRU and LSTM entries for bindings, and how one call is laid out over threads and time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

struct RecurrentPlan {
  int threads;            // wanted members
  bool split_batch;       // share rows of the batch, or units of the hidden state (one barrier a step)
  bool direct;            // so few rows in all that weights are not packed beforehand but read in place
  int64_t forward_rows;   // rows at most whose input projection is made at once, one step's at least
  int64_t backward_rows;  // rows at most between two rounds of weight gradients
  int64_t work_ns;        // rough time on one thread
  bool splits_state;      // of floats that are split: whether also where they meet the recurrent weights

  template <class S>
  static RecurrentPlan make(const RecurrentForwardParams<S>& p, int gates, int64_t rows_in_place, int weight_bytes,
                            int max_threads);
  template <class S>
  static RecurrentPlan make(const RecurrentBackwardParams<S>& p, int gates, int weight_bytes, int max_threads);
  // For a Stream: weights of `weight_bytes` each, packed and perhaps still in cache; p: the first of its layers.
  template <class S>
  static RecurrentPlan make_stream(const RecurrentForwardParams<S>& p, int gates, int64_t layers, int weight_bytes,
                                   int max_threads);
};

template <class S>
void gru_forward(const RecurrentForwardParams<S>& p, int max_threads, ParallelFor parallel_for);
template <class S>
void gru_backward(const RecurrentBackwardParams<S>& p, int max_threads, ParallelFor parallel_for);
template <class S>
void lstm_forward(const RecurrentForwardParams<S>& p, int max_threads, ParallelFor parallel_for);
template <class S>
void lstm_backward(const RecurrentBackwardParams<S>& p, int max_threads, ParallelFor parallel_for);

}  // namespace fastlm::cpu
