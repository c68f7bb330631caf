// What the GRU and LSTM bindings share: sizes and sequences with their checks.
#pragma once

#include "bindings/common.h"
#include "core/params.h"
#include "cpu/sequences.h"

namespace fastlm::bindings {

// The call's sizes, and which steps its sequences have: x is (T, B, I), packed (rows, I) with batch_sizes, or one
// step's (B, I).
class RecurrentCall {
 public:
  RecurrentCall(const Tensor& x, const Tensor& w_hh, int64_t gate_count, const OptionalTensor& lengths,
                const OptionalTensor& batch_sizes, const OptionalTensor& reset_mask)
      : dtype(x.scalar_type()), flat_(x.dim() == 2), one_step_(flat_ && !batch_sizes) {
    check(w_hh.dim() == 2, "w_hh: expected 2 dimensions (gates * H, H)");
    hidden = w_hh.size(1), gates = gate_count * hidden;
    if (batch_sizes) {
      check(!lengths && !reset_mask, "batch_sizes: expected neither lengths nor reset_mask beside them");
      take_packed(x, *batch_sizes);
    } else if (one_step_) {
      check(!lengths && !reset_mask, "x: expected 3 dimensions (T, B, I) with lengths or reset_mask");
      seq_len = 1, batch = rows_ = x.size(0), input_size = x.size(1);
    } else {
      check(x.dim() == 3, "x: expected 3 dimensions (T, B, I)");
      seq_len = x.size(0), batch = x.size(1), input_size = x.size(2);
      if (lengths) take_lengths(*lengths);
    }
    check(seq_len > 0, "x: expected at least one time step");
    resets_ = dense(reset_mask, "reset_mask", {seq_len, batch}, ScalarType::Bool);
  }

  // The shape of one row of `width` per step and sequence.
  Shape rows(int64_t width) const { return flat_ ? Shape{rows_, width} : Shape{seq_len, batch, width}; }
  // Of the states that the call makes, and of those that it is given, which may have either form beside any x.
  Shape states() const { return states(!one_step_); }
  Shape states_as(const OptionalTensor& given) const { return states(given && given->dim() == 3); }

  template <class Params>
  void fill(Params& p) const {
    p.seq_len = seq_len, p.batch = batch, p.input_size = input_size, p.hidden = hidden;
    p.ragged = sequences_ ? &ragged_ : nullptr;
    p.resets = read<bool>(resets_);
  }

  int64_t seq_len = 0, batch = 0, input_size = 0, hidden = 0, gates = 0;
  const ScalarType dtype;

 private:
  Shape states(bool layered) const { return layered ? Shape{1, batch, hidden} : Shape{batch, hidden}; }
  void take_packed(const Tensor& x, const Tensor& batch_sizes) {
    check(flat_, "x: expected 2 dimensions (rows, I) with batch_sizes");
    rows_ = x.size(0), input_size = x.size(1);
    check(batch_sizes.dim() == 1, "batch_sizes: expected 1 dimension");
    seq_len = batch_sizes.size(0);
    const Tensor sizes = dense(batch_sizes, "batch_sizes", {seq_len}, ScalarType::Long);
    take(cpu::Sequences::packed(read<int64_t>(sizes), seq_len, rows_));
    if (seq_len > 0) batch = read<int64_t>(sizes)[0];
  }
  void take_lengths(const Tensor& lengths) {
    const Tensor checked = dense(lengths, "lengths", {batch}, ScalarType::Long);
    take(cpu::Sequences::padded(read<int64_t>(checked), batch, seq_len));
    if (sequences_->uniform()) sequences_.reset();
  }
  void take(cpu::Sequences sequences) {
    sequences_ = std::move(sequences);
    ragged_ = sequences_->view();
  }

  const bool flat_, one_step_;  // flat: no dimension of time
  int64_t rows_ = 0;
  std::optional<cpu::Sequences> sequences_;
  Ragged ragged_{};
  OptionalTensor resets_;
};

}  // namespace fastlm::bindings
