// The time loop shared by GRU and LSTM, forward and backward; what differs is a Cell (gru.inl, lstm.inl).
//
// Hidden units are worked on in blocks of kCols. The four slots of a block (core/gates.h) lie side by side, so that a
// panel of weights meets the rows of h, and the activations follow while the sums are still in L1.
//
// Forward: input projection of some steps at once, which leaves sums with biases in `gates`; then per step the
// recurrent product on top of them and the activations.
// Backward: per step the gradients of the slots, `d_gates`, and the product that carries them to the step before; per
// chunk of steps the three large products for grad_x and the weight gradients, accumulated chunk by chunk.
//
// Two ways to share the work. Rows of the batch: no synchronisation inside a chunk. Units of the hidden state (large
// weights): every member reads only its part of the weights, with one barrier a step; blocks change hands within a step
// where a member is behind (Team::share).
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

// How many rows of this depth stay in L2 while panel after panel of weights passes by; and what depth, for many rows.
template <class T>
int64_t rows_in_cache(int64_t depth) {
  constexpr int64_t kElements = (192 << 10) / sizeof(T);
  return std::max<int64_t>(kElements / std::max<int64_t>(depth, 1) / kTileRows, 4) * kTileRows;
}
template <class T>
constexpr int64_t kDepthInCache = 2 * kBlockDepth<T>;

template <class T>
struct RecurrentSizes {
  int64_t blocks, units, slots_width;  // blocks of hidden units; units of a block; one row of a block's four slots
  explicit RecurrentSizes(int64_t hidden)
      : blocks((hidden + kCols<T> - 1) / kCols<T>), units(kCols<T>), slots_width(kSlots * kCols<T>) {}
};

template <class T>
struct ForwardBuffers {
  T* panels_ih;  // [block][gate][I][kCols]
  T* panels_hh;  // [block][gate][H][kCols]
  T* bias;       // [block][slot][kCols]: what a slot starts from
  T* gates[2];   // [block][time within the chunk][B][slot][kCols]; two, of chunks in turn, where units are shared
  T* h[2];       // (B, padded H): state before and after a step
  T* c;          // (B, padded H)
  T* late;       // per member: max(I, H) x kCols, a panel packed when it is wanted

  template <class Cell>
  static ForwardBuffers take(Workspace& workspace, const RecurrentForwardParams<T>& p, const RecurrentPlan& plan) {
    const RecurrentSizes<T> sizes(p.hidden);
    const int64_t state = p.batch * padded<T>(p.hidden);
    ForwardBuffers buffers{};
    if (plan.direct) {
      buffers.late = workspace.take<T>(plan.threads * late_size(p));
    } else {
      buffers.panels_ih = workspace.take<T>(sizes.blocks * Cell::kGates * p.input_size * kCols<T>);
      buffers.panels_hh = workspace.take<T>(sizes.blocks * Cell::kGates * p.hidden * kCols<T>);
    }
    buffers.bias = workspace.take<T>(sizes.blocks * sizes.slots_width);
    const int64_t gates = plan.forward_chunk * sizes.blocks * p.batch * sizes.slots_width;
    buffers.gates[0] = workspace.take<T>(gates);
    buffers.gates[1] = plan.split_batch ? buffers.gates[0] : workspace.take<T>(gates);
    for (auto& h : buffers.h) h = workspace.take<T>(state);
    buffers.c = workspace.take<T>(state);
    return buffers;
  }
  static int64_t late_size(const RecurrentForwardParams<T>& p) { return std::max(p.input_size, p.hidden) * kCols<T>; }
};

template <class T, class Cell>
class ForwardPass {
 public:
  ForwardPass(const RecurrentForwardParams<T>& p, const RecurrentPlan& plan, const ForwardBuffers<T>& buffers,
              const Team& team)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        team_(team),
        sizes_(p.hidden),
        rows_(plan.split_batch ? team.split(p.batch) : Team::Range{0, p.batch}),
        stride_(padded<T>(p.hidden)) {}

  void run() {
    if (!plan_.direct) pack_weights();
    start_bias();
    start_state();
    team_.barrier();
    for (int64_t first = 0; first < p_.seq_len; first += plan_.forward_chunk) {
      const int64_t last = std::min(p_.seq_len, first + plan_.forward_chunk);
      const Chunk chunk{p_.reverse ? p_.seq_len - last : first, buffers_.gates[first / plan_.forward_chunk % 2]};
      run_chunk(chunk, first, last);
    }
    if (!plan_.split_batch) team_.barrier();
    finish_state();
  }

 private:
  using Row = typename Cell::template ForwardRow<T>;
  struct Chunk {
    int64_t t0;  // its first time
    T* gates;
  };

  void run_chunk(const Chunk& chunk, int64_t first, int64_t last) {
    if (p_.seq_len == 1)
      return for_blocks(false, [&](int64_t block) {
        project_block(chunk, rows_.begin, rows_.end - rows_.begin, block);
        recurrent_block(chunk, 0, block);
      });
    project_input(chunk, last - first);
    for (int64_t step = first; step < last; ++step) {
      // The last step of a chunk needs none behind it: the next chunk's sums lie elsewhere.
      if (!plan_.split_batch) team_.barrier();
      recurrent_step(chunk, step);
    }
  }

  int64_t time(int64_t step) const { return p_.reverse ? p_.seq_len - 1 - step : step; }
  // The slots of a block at a time within the chunk, from row b of the batch on.
  T* slots(const Chunk& chunk, int64_t block, int64_t chunk_time, int64_t b) const {
    return chunk.gates + ((block * plan_.forward_chunk + chunk_time) * p_.batch + b) * sizes_.slots_width;
  }
  const T* bias(int64_t block, int slot) const { return buffers_.bias + block * sizes_.slots_width + slot * kCols<T>; }
  int64_t units_of(int64_t block) const { return std::min(kCols<T>, p_.hidden - block * kCols<T>); }

  template <class Body>
  void for_blocks(bool backwards, const Body& body) {
    if (!plan_.split_batch) return team_.share(sizes_.blocks, backwards, body);
    for (int64_t i = 0; i < sizes_.blocks; ++i) body(backwards ? sizes_.blocks - 1 - i : i);
  }

  void pack_weights() {
    const auto range = team_.split(sizes_.blocks * Cell::kGates);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t block = i / Cell::kGates, gate = i % Cell::kGates;
      const int64_t row = gate * p_.hidden + block * kCols<T>, units = units_of(block);
      pack_transposed(p_.w_ih + row * p_.input_size, p_.input_size, p_.input_size, units,
                      buffers_.panels_ih + i * p_.input_size * kCols<T>);
      pack_transposed(p_.w_hh + row * p_.hidden, p_.hidden, p_.hidden, units,
                      buffers_.panels_hh + i * p_.hidden * kCols<T>);
    }
  }

  void start_bias() {
    const auto range = team_.split(sizes_.blocks);
    for (int64_t block = range.begin; block < range.end; ++block)
      for (int slot = 0; slot < kSlots; ++slot) {
        T* to = buffers_.bias + block * sizes_.slots_width + slot * kCols<T>;
        Cell::bias(p_, slot, block * kCols<T>, units_of(block), to);
        std::fill(to + units_of(block), to + kCols<T>, T(0));
      }
  }

  void start_state() {
    const auto own = team_.split(p_.batch);
    const auto start = [&](const T* from, T* to) {
      for (int64_t b = own.begin; b < own.end; ++b)
        if (from)
          std::copy_n(from + b * p_.hidden, p_.hidden, to + b * stride_);
        else
          std::fill_n(to + b * stride_, p_.hidden, T(0));
    };
    start(p_.h0, buffers_.h[0]);
    if (Cell::kHasCellState) start(p_.c0, buffers_.c);
  }

  // slots (rows) = init + a (rows, depth) times the weights of one block and gate, packed or in place.
  void product(const T* a, int64_t a_stride, int64_t rows, const T* panels, const T* weights, int64_t depth,
               int64_t block, int gate, T* slots, Init init, const T* bias, int deal) {
    const T* panel = panels + (block * Cell::kGates + gate) * depth * kCols<T>;
    if (plan_.direct) {
      const T* stored = weights + (gate * p_.hidden + block * kCols<T>)*depth;
      if (p_.batch <= kDotRowsAtMost)  // not this member's rows: sums must not depend on how many share them
        return dot_product<T>(
            {a, a_stride, stored, depth, units_of(block), depth, slots, sizes_.slots_width, init, bias}, rows);
      T* late = buffers_.late + team_.rank * ForwardBuffers<T>::late_size(p_);
      pack_transposed(stored, depth, depth, units_of(block), late);
      panel = late;
    }
    panel_product(a, a_stride, rows, panel, kCols<T>, depth, slots, sizes_.slots_width, init, bias, deal,
                  plan_.direct ? panel : panel + depth * kCols<T>);
  }

  // Rows of all steps at once where this member has the whole batch, else step by step.
  void project_input(const Chunk& chunk, int64_t steps) {
    if (rows_.end - rows_.begin < p_.batch) {
      for (int64_t t = 0; t < steps; ++t) project_rows(chunk, t * p_.batch + rows_.begin, rows_.end - rows_.begin);
      return;
    }
    const int64_t rows = steps * p_.batch, together = rows_in_cache<T>(p_.input_size);
    for (int64_t row = 0; row < rows; row += together) project_rows(chunk, row, std::min(together, rows - row));
  }

  // Rows [row, row + count) of the chunk, counted over time and batch.
  void project_rows(const Chunk& chunk, int64_t row, int64_t count) {
    for_blocks(false, [&](int64_t block) { project_block(chunk, row, count, block); });
  }

  void project_block(const Chunk& chunk, int64_t row, int64_t count, int64_t block) {
    const int deal = accumulators(p_.seq_len * p_.batch);
    const T* x = p_.x + (chunk.t0 * p_.batch + row) * p_.input_size;
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int slot = Cell::input_slot(gate);
      product(x, p_.input_size, count, buffers_.panels_ih, p_.w_ih, p_.input_size, block, gate,
              slots(chunk, block, 0, row) + slot * kCols<T>, Init::kBias, bias(block, slot), deal);
    }
  }

  void recurrent_step(const Chunk& chunk, int64_t step) {
    for_blocks(step % 2, [&](int64_t block) { recurrent_block(chunk, step, block); });
  }

  void recurrent_block(const Chunk& chunk, int64_t step, int64_t block) {
    const T* h = buffers_.h[step % 2] + rows_.begin * stride_;
    T* sums = slots(chunk, block, time(step) - chunk.t0, rows_.begin);
    fetch_results(step, block);
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int slot = Cell::state_slot(gate);
      product(h, stride_, rows_.end - rows_.begin, buffers_.panels_hh, p_.w_hh, p_.hidden, block, gate,
              sums + slot * kCols<T>, slot == Cell::input_slot(gate) ? Init::kAccumulate : Init::kBias,
              bias(block, slot), accumulators(p_.batch));
    }
    const auto for_rows = [&](const auto& activate) {
      for (int64_t b = rows_.begin; b < rows_.end; ++b)
        activate(result_row(step, block, b, sums + (b - rows_.begin) * sizes_.slots_width));
    };
    if (units_of(block) == kCols<T>) {
      using P = Pack<T, kTileVecs>;
      for_rows([](const Row& row) FASTLM_LAMBDA_INLINE { Cell::template forward_gates<P>(row, 0, kCols<T>); });
      for_rows([](const Row& row) FASTLM_LAMBDA_INLINE { Cell::template forward_state<P>(row, 0, kCols<T>); });
    } else {
      for_rows([&](const Row& row) { activate_partial(row, units_of(block)); });
    }
  }

  static void activate_partial(const Row& row, int64_t units) {
    for (int64_t u = 0; u < units; u += Vec<T>::kLanes) {
      const int64_t n = std::min<int64_t>(Vec<T>::kLanes, units - u);
      Cell::template forward_gates<Vec<T>>(row, u, n);
      Cell::template forward_state<Vec<T>>(row, u, n);
    }
  }

  Row result_row(int64_t step, int64_t block, int64_t b, T* sums) const {
    const int64_t row = time(step) * p_.batch + b, unit = block * kCols<T>;
    return {sums,
            buffers_.h[step % 2] + b * stride_ + unit,
            buffers_.h[(step + 1) % 2] + b * stride_ + unit,
            buffers_.c + b * stride_ + unit,
            p_.output + row * p_.hidden + unit,
            p_.reserve ? p_.reserve + row * Cell::kReserve * p_.hidden + unit : nullptr,
            p_.hidden};
  }

  // Calls for the lines that `activate` writes, none of them in any cache yet, while the products run.
  void fetch_results(int64_t step, int64_t block) const {
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      const auto row = result_row(step, block, b, nullptr);
      fetch_units(row.output, units_of(block));
      for (int column = 0; row.reserve && column < Cell::kReserve; ++column)
        fetch_units(row.reserve + column * p_.hidden, units_of(block));
    }
  }
  static void fetch_units(const T* p, int64_t units) {
    for (int64_t u = 0; u < units; u += 64 / sizeof(T)) __builtin_prefetch(p + u, 1);
  }

  void finish_state() {
    const auto own = plan_.split_batch ? rows_ : team_.split(p_.batch);
    const T* h = buffers_.h[p_.seq_len % 2];
    for (int64_t b = own.begin; b < own.end; ++b) {
      std::copy_n(h + b * stride_, p_.hidden, p_.h_n + b * p_.hidden);
      if (Cell::kHasCellState) std::copy_n(buffers_.c + b * stride_, p_.hidden, p_.c_n + b * p_.hidden);
    }
  }

  const RecurrentForwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const ForwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_;
  const int64_t stride_;
};

constexpr int kSumVecs = 4;  // columns summed together for the biases, so that whole cache lines are read

// The last slot's columns may be read kSumVecs at a time.
template <class T>
int64_t d_gates_stride(int64_t hidden) {
  return padded<T>(kSlots * hidden + kSumVecs * Vec<T>::kLanes);
}

template <class T>
struct BackwardBuffers {
  T* panels_hh;  // [block][G*H][kCols]
  T* panels_ih;  // [panel of I][G*H][kCols]
  T* d_gates;    // [step of the chunk][B](4H, padded)
  T* dh;         // (B, padded H): gradient carried to the step before
  T* dc;         // (B, padded H)
  T* edge;       // per member: kBlockRows x kCols
  T* late;       // per member: kDepthInCache x kCols, a panel packed when it is wanted
  GemmBuffers<T> gemm;

  template <class Cell>
  static BackwardBuffers take(Workspace& workspace, const RecurrentBackwardParams<T>& p, const RecurrentPlan& plan) {
    const int64_t gates = Cell::kGates * p.hidden, state = p.batch * padded<T>(p.hidden);
    const int64_t rows = plan.backward_chunk * p.batch;
    const int64_t panels_h = panels_for<T>(p.hidden), panels_i = panels_for<T>(p.input_size);
    BackwardBuffers buffers{};
    if (!plan.direct) {
      buffers.panels_hh = workspace.take<T>(panels_h * gates * kCols<T>);
      if (p.grad_x) buffers.panels_ih = workspace.take<T>(panels_i * gates * kCols<T>);
    }
    buffers.d_gates = workspace.take<T>(rows * d_gates_stride<T>(p.hidden));
    buffers.dh = workspace.take<T>(state);
    buffers.dc = workspace.take<T>(state);
    buffers.edge = workspace.take<T>(plan.threads * kBlockRows * kCols<T>);
    buffers.late = workspace.take<T>(plan.threads * kDepthInCache<T> * kCols<T>);
    if (p.grad_w_ih || p.grad_w_hh)
      buffers.gemm = GemmBuffers<T>::take(workspace, panels_h + panels_i, rows, plan.threads);
    return buffers;
  }
};

template <class T, class Cell>
class BackwardPass {
 public:
  BackwardPass(const RecurrentBackwardParams<T>& p, const RecurrentPlan& plan, const BackwardBuffers<T>& buffers,
               const Team& team)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        team_(team),
        sizes_(p.hidden),
        rows_(plan.split_batch ? team.split(p.batch) : Team::Range{0, p.batch}),
        stride_(padded<T>(p.hidden)),
        gates_stride_(d_gates_stride<T>(p.hidden)) {}

  void run() {
    if (!plan_.direct) pack_weights();
    start_state();
    team_.barrier();
    // Steps in the order of forward are 0 .. T-1; backward takes chunks and steps from the last to the first.
    for (int64_t last = p_.seq_len; last > 0;) {
      const int64_t first = std::max<int64_t>(0, last - plan_.backward_chunk);
      const int64_t t0 = p_.reverse ? p_.seq_len - last : first;  // the chunk's rows lie in order of time
      for_groups(false, [&](Blocks blocks) { differentiate(last - 1, t0, blocks); });
      for (int64_t step = last - 1; step >= first; --step) {
        if (!plan_.split_batch) team_.barrier();
        for_groups(step % 2, [&](Blocks blocks) { carry_and_differentiate(step, first, t0, blocks); });
      }
      team_.barrier();
      const bool accumulate = last < p_.seq_len;
      input_gradient(t0, last - first);
      weight_gradients(t0, last - first, accumulate);
      bias_gradients(last - first, accumulate);
      team_.barrier();
      last = first;
    }
    finish_state();
  }

 private:
  using Blocks = Team::Range;  // blocks of hidden units

  int64_t time(int64_t step) const { return p_.reverse ? p_.seq_len - 1 - step : step; }
  T* d_gates(int64_t chunk_row) const { return buffers_.d_gates + chunk_row * gates_stride_; }

  // A piece of weights (G*H, width): rows from k on, columns of one panel.
  struct Piece {
    const T* data;
    int64_t stride;
  };
  Piece piece(const T* packed, const T* weights, int64_t width, int64_t panel, int64_t k, int64_t depth) const {
    if (!plan_.direct) return {packed + (panel * Cell::kGates * p_.hidden + k) * kCols<T>, kCols<T>};
    const int64_t cols = std::min(kCols<T>, width - panel * kCols<T>);
    const T* data = weights + k * width + panel * kCols<T>;
    // In place where one tile reads it, and no other comes.
    if (cols == kCols<T> && rows_.end - rows_.begin <= kTileRows) return {data, width};
    T* late = buffers_.late + team_.rank * kDepthInCache<T> * kCols<T>;
    pack_rows(data, width, depth, cols, late);
    return {late, kCols<T>};
  }

  void pack_weights() {
    const int64_t gates = Cell::kGates * p_.hidden;
    const auto pack = [&](const T* weights, int64_t width, T* panels) {
      const auto range = team_.split(panels_for<T>(width));
      for (int64_t i = range.begin; i < range.end; ++i)
        pack_rows(weights + i * kCols<T>, width, gates, std::min(kCols<T>, width - i * kCols<T>),
                  panels + i * gates * kCols<T>);
    };
    pack(p_.w_hh, p_.hidden, buffers_.panels_hh);
    if (p_.grad_x) pack(p_.w_ih, p_.input_size, buffers_.panels_ih);
  }

  void start_state() {
    const auto own = team_.split(p_.batch);
    const auto start = [&](const T* from, T* to) {
      for (int64_t b = own.begin; b < own.end; ++b)
        if (from)
          std::copy_n(from + b * p_.hidden, p_.hidden, to + b * stride_);
        else
          std::fill_n(to + b * stride_, p_.hidden, T(0));
    };
    start(p_.grad_h_n, buffers_.dh);
    if (Cell::kHasCellState) start(p_.grad_c_n, buffers_.dc);
  }

  // Blocks that one member works on at a time: few, so that none waits long for another, but enough that the
  // gradients of all slots, which every block reads, do not come from L3 each time.
  template <class Body>
  void for_groups(bool backwards, const Body& body) {
    if (plan_.split_batch) return body(Blocks{0, sizes_.blocks});
    const bool fits = p_.batch * Cell::kGates * p_.hidden * static_cast<int64_t>(sizeof(T)) <= 128 << 10;
    const int64_t group = fits ? 1 : std::clamp<int64_t>(sizes_.blocks / (4 * team_.size), 1, 4);
    team_.share((sizes_.blocks + group - 1) / group, backwards,
                [&](int64_t i) { body(Blocks{i * group, std::min(sizes_.blocks, (i + 1) * group)}); });
  }

  void differentiate(int64_t step, int64_t t0, Blocks blocks) {
    const int64_t begin = blocks.begin * kCols<T>, end = std::min(p_.hidden, blocks.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      const int64_t row = time(step) * p_.batch + b;
      differentiate_row(
          {p_.grad_output ? p_.grad_output + row * p_.hidden : nullptr, p_.reserve + row * Cell::kReserve * p_.hidden,
           buffers_.dh + b * stride_, buffers_.dc + b * stride_, d_gates((time(step) - t0) * p_.batch + b), p_.hidden},
          begin, end);
    }
  }

  static void differentiate_row(const typename Cell::template BackwardRow<T>& row, int64_t begin, int64_t end) {
    int64_t u = begin;
    for (; u + kCols<T> <= end; u += kCols<T>) Cell::template backward<Pack<T, kTileVecs>>(row, u, kCols<T>);
    for (; u < end; u += Vec<T>::kLanes)
      Cell::template backward<Vec<T>>(row, u, std::min<int64_t>(Vec<T>::kLanes, end - u));
  }

  // Carries the gradient over a step, and differentiates the step before it unless that is in the next chunk.
  void carry_and_differentiate(int64_t step, int64_t first, int64_t t0, Blocks blocks) {
    if (step > first) fetch_kept(step - 1, blocks);
    if (step > 0 || p_.grad_h0) carry_back(d_gates((time(step) - t0) * p_.batch + rows_.begin), blocks);
    if (step > first) differentiate(step - 1, t0, blocks);
  }

  // Calls for what `differentiate` will read, which lies in memory since forward.
  void fetch_kept(int64_t step, Blocks blocks) const {
    const int64_t begin = blocks.begin * kCols<T>, end = std::min(p_.hidden, blocks.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      const int64_t row = time(step) * p_.batch + b;
      for (int64_t u = begin; u < end; u += 64 / sizeof(T)) {
        for (int column = 0; column < Cell::kReserve; ++column)
          if (column != Cell::kHiddenKept || Cell::kCarriesHidden)
            __builtin_prefetch(p_.reserve + (row * Cell::kReserve + column) * p_.hidden + u);
        if (p_.grad_output) __builtin_prefetch(p_.grad_output + row * p_.hidden + u);
      }
    }
  }

  // dh (own rows, these blocks) = [what bypasses the product +] d_gates times the recurrent weights.
  void carry_back(const T* d_gates, Blocks blocks) {
    bool first = !Cell::kCarriesHidden;
    for (const auto& run : Cell::kRuns) {
      if (!run.state) continue;
      for (int64_t k = 0; k < run.count * p_.hidden; k += kDepthInCache<T>, first = false)
        carry_back_piece(d_gates + run.slot * p_.hidden + k, run.gate * p_.hidden + k,
                         std::min(kDepthInCache<T>, run.count * p_.hidden - k), first ? Init::kZero : Init::kAccumulate,
                         blocks);
    }
  }

  // The same for rows [k, k + depth) of the recurrent weights; a: their slots.
  void carry_back_piece(const T* a, int64_t k, int64_t depth, Init init, Blocks blocks) {
    const int deal = accumulators(p_.batch);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto weights = piece(buffers_.panels_hh, p_.w_hh, p_.hidden, block, k, depth);
      const bool last = block + 1 == blocks.end;  // then the same block's next rows, or the group's first block, follow
      const int64_t ahead =
          last ? depth - (blocks.end - blocks.begin - 1) * Cell::kGates * p_.hidden : Cell::kGates * p_.hidden;
      panel_product(a, gates_stride_, rows_.end - rows_.begin, weights.data, weights.stride, depth,
                    buffers_.dh + rows_.begin * stride_ + block * kCols<T>, stride_, init,
                    static_cast<const T*>(nullptr), deal, weights.data + (plan_.direct ? 0 : ahead * kCols<T>));
    }
  }

  // Shared by rows, or by columns where rows are few.
  void input_gradient(int64_t t0, int64_t steps) {
    if (!p_.grad_x) return;
    const int64_t rows = steps * p_.batch, panels = panels_for<T>(p_.input_size);
    if (plan_.direct)
      return team_.share(panels, false, [&](int64_t i) { input_gradient_block(t0, {0, rows}, {i, i + 1}); });
    team_.share((rows + kBlockRows - 1) / kBlockRows, false, [&](int64_t i) {
      input_gradient_block(t0, {i * kBlockRows, std::min(rows, (i + 1) * kBlockRows)}, {0, panels});
    });
  }

  void input_gradient_block(int64_t t0, Team::Range rows, Team::Range panels) {
    const int64_t depth = Cell::kGates * p_.hidden;
    for (int64_t k = 0; k < depth; k += kDepthInCache<T>)
      for (int64_t i = panels.begin; i < panels.end; ++i)
        input_gradient_piece(t0, rows, i, k, std::min(kDepthInCache<T>, depth - k));
  }

  // Adds the part of gate rows [k, k + depth) to one panel of these rows of grad_x, counted within the chunk.
  void input_gradient_piece(int64_t t0, Team::Range rows, int64_t panel, int64_t k, int64_t depth) {
    const int deal = accumulators(p_.seq_len * p_.batch);
    const int64_t col = panel * kCols<T>, cols = std::min(kCols<T>, p_.input_size - col);
    const bool whole = cols == kCols<T>;
    T* grad_x = p_.grad_x + (t0 * p_.batch + rows.begin) * p_.input_size + col;
    T* edge = buffers_.edge + team_.rank * kBlockRows * kCols<T>;
    const auto weights = piece(buffers_.panels_ih, p_.w_ih, p_.input_size, panel, k, depth);
    panel_product(static_cast<const T*>(d_gates(rows.begin) + k), gates_stride_, rows.end - rows.begin, weights.data,
                  weights.stride, depth, whole ? grad_x : edge, whole ? p_.input_size : kCols<T>,
                  k == 0 ? Init::kZero : Init::kAccumulate, static_cast<const T*>(nullptr), deal,
                  weights.data + (plan_.direct ? 0 : Cell::kGates * p_.hidden * kCols<T>));
    // The last, partial panel is summed up aside, since a tile writes whole vectors.
    if (!whole && k + depth == Cell::kGates * p_.hidden)
      for (int64_t r = 0; r < rows.end - rows.begin; ++r)
        std::copy_n(edge + r * kCols<T>, cols, grad_x + r * p_.input_size);
  }

  // The slots' gradients meet x and the states before the steps; both products of a run share their packing.
  void weight_gradients(int64_t t0, int64_t steps, bool accumulate) {
    const int64_t depth = steps * p_.batch, row = t0 * p_.batch;
    const T* h = p_.reserve + (row * Cell::kReserve + Cell::kHiddenKept) * p_.hidden;
    for (const auto& run : Cell::kRuns) {
      GemmParams<T> parts[2];
      int count = 0;
      const auto add = [&](const T* b, int64_t b_stride, int64_t width, T* grad) {
        parts[count++] = {run.count * p_.hidden,
                          width,
                          depth,
                          d_gates(0) + run.slot * p_.hidden,
                          gates_stride_,
                          true,
                          b,
                          b_stride,
                          false,
                          grad + run.gate * p_.hidden * width,
                          width,
                          accumulate};
      };
      if (run.input && p_.grad_w_ih) add(p_.x + row * p_.input_size, p_.input_size, p_.input_size, p_.grad_w_ih);
      if (run.state && p_.grad_w_hh) add(h, Cell::kReserve * p_.hidden, p_.hidden, p_.grad_w_hh);
      if (count == 0) continue;
      gemm(Products<T>{parts, count}, buffers_.gemm, team_);
      team_.barrier();
    }
  }

  void bias_gradients(int64_t steps, bool accumulate) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      T* ih = p_.grad_b_ih ? p_.grad_b_ih + gate * p_.hidden : nullptr;
      T* hh = p_.grad_b_hh ? p_.grad_b_hh + gate * p_.hidden : nullptr;
      const auto own = team_.split(p_.hidden, kSumVecs * Vec<T>::kLanes);
      if (ih) column_sum(steps, Cell::input_slot(gate), own, ih, accumulate);
      if (hh && ih && Cell::state_slot(gate) == Cell::input_slot(gate))
        std::copy(ih + own.begin, ih + own.end, hh + own.begin);
      else if (hh)
        column_sum(steps, Cell::state_slot(gate), own, hh, accumulate);
    }
  }

  // Sum over the chunk's rows of some columns of a slot; in blocks of rows, for accuracy over many of them.
  void column_sum(int64_t steps, int slot, Team::Range columns, T* sums, bool accumulate) {
    using V = Vec<T>;
    constexpr int64_t kBlock = 32;
    const int64_t rows = steps * p_.batch;
    for (int64_t u = columns.begin; u < columns.end; u += kSumVecs * V::kLanes) {
      V total[kSumVecs];
      for (auto& t : total) t = V::zero();
      for (int64_t row = 0; row < rows;) {
        V block[kSumVecs];
        for (auto& b : block) b = V::zero();
        for (const int64_t end = std::min(rows, row + kBlock); row < end; ++row)
          for (int v = 0; v < kSumVecs; ++v)
            block[v] = block[v] + V::load(d_gates(row) + slot * p_.hidden + u + v * V::kLanes);
        for (int v = 0; v < kSumVecs; ++v) total[v] = total[v] + block[v];
      }
      for (int v = 0; v < kSumVecs; ++v) {
        const int64_t first = u + v * V::kLanes, n = std::clamp<int64_t>(columns.end - first, 0, V::kLanes);
        if (accumulate) total[v] = total[v] + V::load_partial(sums + first, n);
        total[v].store_partial(sums + first, n);
      }
    }
  }

  void finish_state() {
    const auto own = team_.split(p_.batch);
    for (int64_t b = own.begin; b < own.end; ++b) {
      if (p_.grad_h0) std::copy_n(buffers_.dh + b * stride_, p_.hidden, p_.grad_h0 + b * p_.hidden);
      if (p_.grad_c0) std::copy_n(buffers_.dc + b * stride_, p_.hidden, p_.grad_c0 + b * p_.hidden);
    }
  }

  const RecurrentBackwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const BackwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_;
  const int64_t stride_, gates_stride_;
};

template <class T, class Cell>
void recurrent_forward(const RecurrentForwardParams<T>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  Workspace workspace;
  ForwardBuffers<T>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = ForwardBuffers<T>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns,
           [&](const Team& team) { ForwardPass<T, Cell>(p, plan, buffers, team).run(); });
}

template <class T, class Cell>
void recurrent_backward(const RecurrentBackwardParams<T>& p, const RecurrentPlan& plan, ParallelFor parallel_for) {
  Workspace workspace;
  BackwardBuffers<T>::template take<Cell>(workspace, p, plan);
  workspace.allocate();
  const auto buffers = BackwardBuffers<T>::template take<Cell>(workspace, p, plan);
  run_team(parallel_for, plan.threads, plan.work_ns,
           [&](const Team& team) { BackwardPass<T, Cell>(p, plan, buffers, team).run(); });
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
