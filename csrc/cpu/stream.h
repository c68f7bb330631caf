// A stack of recurrent layers that keeps its state and packed weights between calls: one call for all layers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class S>
struct StreamWeights {
  const S *w_ih, *w_hh;  // (G*H, I of the layer), (G*H, H)
  const S *b_ih, *b_hh;  // (G*H) or null
};

template <class S>
struct StreamParams {
  int64_t batch, input_size, hidden, layers;
  bool bfloat16_weights;            // rounded when packed; for S = float
  const StreamWeights<S>* weights;  // of every layer
};

template <class S>
class Stream {
 public:
  using T = Compute<S>;
  static std::unique_ptr<Stream> make(bool lstm, const StreamParams<S>& params);
  virtual ~Stream();

  // A stream of its own that shares the packed weights.
  virtual Stream* clone() const = 0;
  // x (T, B, I) to output (T, B, H) of the last layer. For T = 1 nothing is allocated, unless x and
  // output share memory.
  virtual void run(const S* x, S* output, int64_t steps, int max_threads, ParallelFor parallel_for) = 0;
  // All states, (layers, B, H) each; c may be null for a GRU.
  virtual void read_state(S* h, T* c) const = 0;
  virtual void write_state(const S* h, const T* c) = 0;
  // Zeros for one row of the batch.
  virtual void reset(int64_t row) = 0;
};

}  // namespace fastlm::cpu
