// Buffers of the time loop, forward and backward: strides, blocks of hidden units, the rows of each step.
#pragma once

#include "core/gates.h"
#include "cpu/kernels/operands.inl"
#include "cpu/recurrent.h"
#include "cpu/simd/math.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// A row stride of at least n that spreads consecutive rows over the cache's sets.
template <class E>
int64_t padded(int64_t n) {
  constexpr int64_t cols = kCols<Compute<E>>, line = kSplit<E> ? kSplitColumns : 64 / sizeof(E);
  return (n + cols - 1) / cols * cols + line;
}

template <class T>
struct RecurrentSizes {
  int64_t blocks, slots_width;  // blocks of hidden units; one row of a block's four slots
  explicit RecurrentSizes(int64_t hidden) : blocks(panels_for<T>(hidden)), slots_width(kSlots * kCols<T>) {}
};

// A cell's slots as runs of neighbours: `count` gates from `gate` on lie from `slot` on, as parts of input, state or
// both.
struct SlotRun {
  int slot, gate, count;
  bool input, state;
};

// n values from one place to another, of S or its Compute<S> each; from null: zeros.
template <class From, class To>
void copy_values(const From* from, To* to, int64_t n) {
  using V = Vec<Compute<To>>;
  for (int64_t i = 0; i < n; i += V::kLanes) store_as(from ? load_as<V>(from + i, n - i) : V::zero(), to + i, n - i);
}
#ifdef FASTLM_FLOATS_ELSEWHERE
inline void copy_values(const float* from, SplitFloat* to, int64_t n) {
  if (from)
    copy_rows(from, 0, 1, n, to, 0);
  else
    std::fill_n(to, panel_depth<SplitFloat>(n), SplitFloat{});
}
inline void copy_values(const SplitFloat* from, float* to, int64_t n) {
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += V::kLanes) load_columns<V>(from, i).store_partial(to + i, n - i);
}
#endif
// What fills up a row of operands behind n of them; those that are split come with zeros.
template <class E>
void fill_up(E* row, int64_t n, int64_t stride) {
  if constexpr (!kSplit<E>) std::fill(row + n, row + stride, E{});
}

// Which rows each step works on, in order of time or of the steps taken (the other way round in reverse).
class StepRows {
 public:
  template <class Params>
  explicit StepRows(const Params& p)
      : ragged_(p.ragged), seq_len_(p.seq_len), batch_(p.batch), resets_(p.resets), reverse_(p.reverse) {}

  int64_t steps() const { return ragged_ ? ragged_->steps : seq_len_; }
  int64_t time(int64_t step) const { return reverse_ ? steps() - 1 - step : step; }
  // The first row of a time, and how many it has; time may be steps().
  int64_t first(int64_t time) const { return ragged_ ? ragged_->first[time] : time * batch_; }
  int64_t at(int64_t time) const { return time < steps() ? first(time + 1) - first(time) : 0; }
  int64_t all() const { return first(steps()); }
  // Where a row lies in x, output and their gradients, and a sequence in the batch.
  int64_t place(int64_t row) const { return in_place() ? row : ragged_->place[row]; }
  bool in_place() const { return !ragged_ || !ragged_->place; }
  int64_t sequence(int64_t i) const { return ragged_ && ragged_->order ? ragged_->order[i] : i; }
  int64_t length(int64_t i) const { return ragged_ ? ragged_->before[i + 1] - ragged_->before[i] : seq_len_; }

  // The rows of the steps [begin, end).
  Team::Range rows(int64_t begin, int64_t end) const {
    return reverse_ ? Team::Range{first(steps() - end), first(steps() - begin)} : Team::Range{first(begin), first(end)};
  }
  // The steps from `first` on, one at least, that have no more than `most` rows; or those that end before `last`.
  int64_t chunk_end(int64_t first, int64_t most) const {
    int64_t last = first + 1;
    while (last < steps() && count(first, last + 1) <= most) ++last;
    return last;
  }
  int64_t chunk_begin(int64_t last, int64_t most) const {
    int64_t first = last - 1;
    while (first > 0 && count(first - 1, last) <= most) --first;
    return first;
  }

  // Of two buffers in turn, the one with a sequence's state before its first step and after its last.
  int64_t initial_half(int64_t i) const { return reverse_ ? (steps() - length(i)) % 2 : 0; }
  int64_t final_half(int64_t i) const { return (reverse_ ? steps() : length(i)) % 2; }

  // Whether a sequence starts anew between two steps, the second of which is `step` (0 to steps()).
  bool any_resets() const { return resets_; }
  bool reset(int64_t step, int64_t i) const {
    const int64_t boundary = reverse_ ? steps() - step : step;
    return resets_ && i < at(boundary) && resets_[boundary * batch_ + sequence(i)];
  }

  // Which of a member's own sequences have this step.
  Team::Range active(int64_t step, Team::Range own) const {
    const int64_t count = at(time(step));
    return {std::min(own.begin, count), std::min(own.end, count)};
  }
  // A member's share of the sequences: as many rows as the others have.
  Team::Range split(const Team& team) const {
    if (!ragged_) return team.split(batch_);
    const int64_t* before = ragged_->before;
    const auto cut = [&](int64_t member) {
      return std::lower_bound(before, before + batch_, all() * member / team.size) - before;
    };
    return {team.rank == 0 ? 0 : cut(team.rank), team.rank + 1 == team.size ? batch_ : cut(team.rank + 1)};
  }

  // Writes zeros past the ends of this member's share of the sequences, in a tensor of rows of `width`.
  template <class S>
  void clear_padding(S* tensor, int64_t width, const Team& team) const {
    if (!tensor || !ragged_ || !ragged_->order) return;
    const auto own = team.split(batch_);
    for (int64_t t = 0; t < seq_len_; ++t)
      for (int64_t i = std::max(own.begin, at(t)); i < own.end; ++i)
        std::fill_n(tensor + (t * batch_ + sequence(i)) * width, width, S{});
  }

 private:
  int64_t count(int64_t begin, int64_t end) const {
    const auto range = rows(begin, end);
    return range.end - range.begin;
  }

  const Ragged* ragged_;
  const int64_t seq_len_, batch_;
  const bool* resets_;
  const bool reverse_;
};

// One row of one step, as a cell sees it; pointers are to its first unit, or the block's. E: what products take of h.
template <class S, class E>
struct ForwardRow {
  using T = Compute<S>;
  T* slots;  // [slot][kCols]
  const E* h;
  E* h_new;
  T* c;               // in and out
  S *output, *cells;  // cells: or null
  T* reserve;         // columns at hidden apart, or null
  int64_t hidden;
  bool streams_output, streams_reserve;
};

template <class S>
struct BackwardRow {
  using T = Compute<S>;
  const S *grad_output, *grad_cells;  // or null
  const T* reserve;
  T *dh, *dc;  // in and out
  T* d_gates;  // [slot][H]
  int64_t hidden;
};

// From this many bytes on a result goes past the caches: every line of it would come from memory before it is written,
// and push out what is wanted sooner. (Backward starts with what was written last; where nothing but the last level is
// larger than this, it finds a part of it there.)
constexpr int64_t kStreamedBytes = (FASTLM_VECTOR_BYTES == 64 ? 4 : 32) << 20;

// Whether rows of `width` do, which must be whole cache lines.
template <class T>
bool streams(const T* result, int64_t rows, int64_t width) {
  const auto bytes = width * static_cast<int64_t>(sizeof(T));
  return result && rows * bytes >= kStreamedBytes && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(result) % 64 == 0;
}

// Whether tensors hold something else than what the arithmetic is done in.
template <class S>
constexpr bool kWidens = !std::is_same_v<S, Compute<S>>;

// Whether rows of x are copied before use: they must lie packed, hold E, and whole pairs of them where E is paired.
template <class E, class Params>
bool copies_input(const Params& p) {
  return !std::is_same_v<decltype(p.x), const E*> || !StepRows(p).in_place() || p.input_size % kPairing<E> != 0;
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
