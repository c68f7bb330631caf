// What the GRU and LSTM bindings share: sizes with their checks.
#pragma once

#include "bindings/common.h"
#include "core/params.h"

namespace fastlm::bindings {

struct RecurrentShape {
  int64_t seq_len, batch, input_size, hidden, gates;

  RecurrentShape(const Tensor& x, const Tensor& w_hh, int64_t gate_count) {
    check(x.dim() == 3, "x: expected 3 dimensions (T, B, I)");
    check(w_hh.dim() == 2, "w_hh: expected 2 dimensions (gates * H, H)");
    seq_len = x.size(0), batch = x.size(1), input_size = x.size(2), hidden = w_hh.size(1);
    gates = gate_count * hidden;
    check(seq_len > 0, "x: expected at least one time step");
  }

  template <class Params>
  void fill(Params& p) const {
    p.seq_len = seq_len, p.batch = batch, p.input_size = input_size, p.hidden = hidden;
  }
};

}  // namespace fastlm::bindings
