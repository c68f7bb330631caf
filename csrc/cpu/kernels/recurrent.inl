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
// Two ways to share the work. Rows of the batch: no synchronisation inside a chunk. Units of the hidden state (small
// batches): every member reads only its part of the weights, with one barrier a step.
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
  T* gates;      // [block][time within the chunk][B][slot][kCols]
  T* h[2];       // (B, padded H): state before and after a step
  T* c;          // (B, padded H)

  template <class Cell>
  static ForwardBuffers take(Workspace& workspace, const RecurrentForwardParams<T>& p, const RecurrentPlan& plan) {
    const RecurrentSizes<T> sizes(p.hidden);
    const int64_t state = p.batch * padded<T>(p.hidden);
    ForwardBuffers buffers{};
    if (!plan.direct) {
      buffers.panels_ih = workspace.take<T>(sizes.blocks * Cell::kGates * p.input_size * kCols<T>);
      buffers.panels_hh = workspace.take<T>(sizes.blocks * Cell::kGates * p.hidden * kCols<T>);
    }
    buffers.bias = workspace.take<T>(sizes.blocks * sizes.slots_width);
    buffers.gates = workspace.take<T>(plan.forward_chunk * sizes.blocks * p.batch * sizes.slots_width);
    for (auto& h : buffers.h) h = workspace.take<T>(state);
    buffers.c = workspace.take<T>(state);
    return buffers;
  }
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
        blocks_(plan.split_batch ? Team::Range{0, sizes_.blocks} : team.split(sizes_.blocks)),
        stride_(padded<T>(p.hidden)) {}

  void run() {
    if (!plan_.direct) pack_weights();
    start_bias();
    start_state();
    team_.barrier();
    for (int64_t first = 0; first < p_.seq_len; first += plan_.forward_chunk) {
      const int64_t last = std::min(p_.seq_len, first + plan_.forward_chunk);
      const int64_t t0 = p_.reverse ? p_.seq_len - last : first;
      project_input(t0, last - first);
      for (int64_t step = first; step < last; ++step) {
        recurrent_step(step, time(step) - t0);
        if (!plan_.split_batch && step + 1 < p_.seq_len) team_.barrier();
      }
    }
    finish_state();
  }

 private:
  int64_t time(int64_t step) const { return p_.reverse ? p_.seq_len - 1 - step : step; }
  // The slots of a block at a time within the chunk, from row b of the batch on.
  T* slots(int64_t block, int64_t chunk_time, int64_t b) const {
    return buffers_.gates + ((block * plan_.forward_chunk + chunk_time) * p_.batch + b) * sizes_.slots_width;
  }
  const T* bias(int64_t block, int slot) const { return buffers_.bias + block * sizes_.slots_width + slot * kCols<T>; }
  int64_t units_of(int64_t block) const { return std::min(kCols<T>, p_.hidden - block * kCols<T>); }

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
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block)
      for (int slot = 0; slot < kSlots; ++slot) {
        T* to = buffers_.bias + block * sizes_.slots_width + slot * kCols<T>;
        Cell::bias(p_, slot, block * kCols<T>, units_of(block), to);
        std::fill(to + units_of(block), to + kCols<T>, T(0));
      }
  }

  void start_state() {
    const int64_t begin = blocks_.begin * kCols<T>, end = std::min(p_.hidden, blocks_.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b)
      for (int64_t u = begin; u < end; ++u) {
        buffers_.h[0][b * stride_ + u] = p_.h0 ? p_.h0[b * p_.hidden + u] : T(0);
        if (Cell::kHasCellState) buffers_.c[b * stride_ + u] = p_.c0 ? p_.c0[b * p_.hidden + u] : T(0);
      }
  }

  // slots (rows) = init + a (rows, depth) times the weights of one block and gate, packed or in place.
  void product(const T* a, int64_t a_stride, int64_t rows, const T* panels, const T* weights, int64_t depth,
               int64_t block, int gate, T* slots, Init init, const T* bias, int deal) {
    if (plan_.direct)
      dot_product<T>({a, a_stride, weights + (gate * p_.hidden + block * kCols<T>)*depth, depth, units_of(block), depth,
                      slots, sizes_.slots_width, init, bias},
                     rows);
    else
      panel_product(a, a_stride, rows, panels + (block * Cell::kGates + gate) * depth * kCols<T>, kCols<T>, depth,
                    slots, sizes_.slots_width, init, bias, deal);
  }

  // Rows of all steps at once where this member has the whole batch, else step by step.
  void project_input(int64_t t0, int64_t steps) {
    if (rows_.end - rows_.begin < p_.batch) {
      for (int64_t t = 0; t < steps; ++t) project_rows(t0, t * p_.batch + rows_.begin, rows_.end - rows_.begin);
      return;
    }
    const int64_t rows = steps * p_.batch, together = rows_in_cache<T>(p_.input_size);
    for (int64_t row = 0; row < rows; row += together) project_rows(t0, row, std::min(together, rows - row));
  }

  // Rows [row, row + count) of the chunk, counted over time and batch, for this member's units.
  void project_rows(int64_t t0, int64_t row, int64_t count) {
    const int deal = accumulators(p_.seq_len * p_.batch);
    const T* x = p_.x + (t0 * p_.batch + row) * p_.input_size;
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block)
      for (int gate = 0; gate < Cell::kGates; ++gate) {
        const int slot = Cell::input_slot(gate);
        product(x, p_.input_size, count, buffers_.panels_ih, p_.w_ih, p_.input_size, block, gate,
                slots(block, 0, row) + slot * kCols<T>, Init::kBias, bias(block, slot), deal);
      }
  }

  void recurrent_step(int64_t step, int64_t chunk_time) {
    const T* h = buffers_.h[step % 2];
    T* h_new = buffers_.h[(step + 1) % 2];
    const int deal = accumulators(p_.batch);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      for (int gate = 0; gate < Cell::kGates; ++gate) {
        const int slot = Cell::state_slot(gate);
        product(h + rows_.begin * stride_, stride_, rows_.end - rows_.begin, buffers_.panels_hh, p_.w_hh, p_.hidden,
                block, gate, slots(block, chunk_time, rows_.begin) + slot * kCols<T>,
                slot == Cell::input_slot(gate) ? Init::kAccumulate : Init::kBias, bias(block, slot), deal);
      }
      const int64_t unit = block * kCols<T>;
      for (int64_t b = rows_.begin; b < rows_.end; ++b) {
        const int64_t row = time(step) * p_.batch + b;
        activate({slots(block, chunk_time, b), h + b * stride_ + unit, h_new + b * stride_ + unit,
                  buffers_.c + b * stride_ + unit, p_.output + row * p_.hidden + unit,
                  p_.reserve ? p_.reserve + row * Cell::kReserve * p_.hidden + unit : nullptr, p_.hidden},
                 units_of(block));
      }
    }
  }

  static void activate(const typename Cell::template ForwardRow<T>& row, int64_t units) {
    int64_t u = 0;
    for (; u + Vec<T>::kLanes <= units; u += Vec<T>::kLanes) Cell::forward(row, u, Vec<T>::kLanes);
    if (u < units) Cell::forward(row, u, units - u);
  }

  void finish_state() {
    const T* h = buffers_.h[p_.seq_len % 2];
    const int64_t begin = blocks_.begin * kCols<T>, end = std::min(p_.hidden, blocks_.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      std::copy(h + b * stride_ + begin, h + b * stride_ + end, p_.h_n + b * p_.hidden + begin);
      if (Cell::kHasCellState)
        std::copy(buffers_.c + b * stride_ + begin, buffers_.c + b * stride_ + end, p_.c_n + b * p_.hidden + begin);
    }
  }

  const RecurrentForwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const ForwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_, blocks_;
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
  GemmBuffers<T> gemm_ih, gemm_hh;

  template <class Cell>
  static BackwardBuffers take(Workspace& workspace, const RecurrentBackwardParams<T>& p, const RecurrentPlan& plan) {
    const RecurrentSizes<T> sizes(p.hidden);
    const int64_t gates = Cell::kGates * p.hidden, state = p.batch * padded<T>(p.hidden);
    const int64_t rows = plan.backward_chunk * p.batch;
    BackwardBuffers buffers{};
    buffers.panels_hh = workspace.take<T>(sizes.blocks * gates * kCols<T>);
    if (p.grad_x) buffers.panels_ih = workspace.take<T>((p.input_size + kCols<T> - 1) / kCols<T> * gates * kCols<T>);
    buffers.d_gates = workspace.take<T>(rows * d_gates_stride<T>(p.hidden));
    buffers.dh = workspace.take<T>(state);
    buffers.dc = workspace.take<T>(state);
    buffers.edge = workspace.take<T>(plan.threads * kBlockRows * kCols<T>);
    if (p.grad_w_ih) buffers.gemm_ih = GemmBuffers<T>::take(workspace, p.input_size, rows, plan.threads);
    if (p.grad_w_hh) buffers.gemm_hh = GemmBuffers<T>::take(workspace, p.hidden, rows, plan.threads);
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
        blocks_(plan.split_batch ? Team::Range{0, sizes_.blocks} : team.split(sizes_.blocks)),
        stride_(padded<T>(p.hidden)),
        gates_stride_(d_gates_stride<T>(p.hidden)) {}

  void run() {
    pack_weights();
    start_state();
    team_.barrier();
    // Steps in the order of forward are 0 .. T-1; backward takes chunks and steps from the last to the first.
    for (int64_t last = p_.seq_len; last > 0;) {
      const int64_t first = std::max<int64_t>(0, last - plan_.backward_chunk);
      const int64_t t0 = p_.reverse ? p_.seq_len - last : first;  // the chunk's rows lie in order of time
      for (int64_t step = last - 1; step >= first; --step) recurrent_step(step, time(step) - t0);
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
  int64_t time(int64_t step) const { return p_.reverse ? p_.seq_len - 1 - step : step; }
  int64_t units_of(int64_t block) const { return std::min(kCols<T>, p_.hidden - block * kCols<T>); }
  T* d_gates(int64_t chunk_row) const { return buffers_.d_gates + chunk_row * gates_stride_; }

  // Columns [panel * kCols, + kCols) of weights (G*H, width): in place where few rows make packing a loss.
  struct Panel {
    const T* data;
    int64_t stride;
  };
  bool in_place(int64_t width, int64_t panel) const { return plan_.direct && (panel + 1) * kCols<T> <= width; }
  Panel panel(const T* packed, const T* weights, int64_t width, int64_t panel) const {
    if (in_place(width, panel)) return {weights + panel * kCols<T>, width};
    return {packed + panel * Cell::kGates * p_.hidden * kCols<T>, kCols<T>};
  }

  void pack_weights() {
    const int64_t gates = Cell::kGates * p_.hidden;
    const auto pack = [&](const T* weights, int64_t width, T* panels) {
      const auto range = team_.split((width + kCols<T> - 1) / kCols<T>);
      for (int64_t i = range.begin; i < range.end; ++i)
        if (!in_place(width, i))
          pack_rows(weights + i * kCols<T>, width, gates, std::min(kCols<T>, width - i * kCols<T>),
                    panels + i * gates * kCols<T>);
    };
    pack(p_.w_hh, p_.hidden, buffers_.panels_hh);
    if (p_.grad_x) pack(p_.w_ih, p_.input_size, buffers_.panels_ih);
  }

  void start_state() {
    const int64_t begin = blocks_.begin * kCols<T>, end = std::min(p_.hidden, blocks_.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b)
      for (int64_t u = begin; u < end; ++u) {
        buffers_.dh[b * stride_ + u] = p_.grad_h_n ? p_.grad_h_n[b * p_.hidden + u] : T(0);
        if (Cell::kHasCellState) buffers_.dc[b * stride_ + u] = p_.grad_c_n ? p_.grad_c_n[b * p_.hidden + u] : T(0);
      }
  }

  void recurrent_step(int64_t step, int64_t chunk_time) {
    const int64_t begin = blocks_.begin * kCols<T>, end = std::min(p_.hidden, blocks_.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      const int64_t row = time(step) * p_.batch + b;
      differentiate(
          {p_.grad_output ? p_.grad_output + row * p_.hidden : nullptr, p_.reserve + row * Cell::kReserve * p_.hidden,
           buffers_.dh + b * stride_, buffers_.dc + b * stride_, d_gates(chunk_time * p_.batch + b), p_.hidden},
          begin, end);
    }
    if (!plan_.split_batch) team_.barrier();
    if (step == 0 && !p_.grad_h0) return;
    const T* a = d_gates(chunk_time * p_.batch + rows_.begin);
    bool first = !Cell::kCarriesHidden;
    for (const auto& run : Cell::kStateRuns)
      for (int64_t k = 0; k < run.count * p_.hidden; k += kDepthInCache<T>, first = false)
        carry_back(a + run.slot * p_.hidden + k, run.gate * p_.hidden + k,
                   std::min(kDepthInCache<T>, run.count * p_.hidden - k), first ? Init::kZero : Init::kAccumulate);
  }

  // dh (own rows, own units) = init + a times rows [k, k + depth) of the recurrent weights.
  void carry_back(const T* a, int64_t k, int64_t depth, Init init) {
    const int deal = accumulators(p_.batch);
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      const auto panel = this->panel(buffers_.panels_hh, p_.w_hh, p_.hidden, block);
      panel_product(a, gates_stride_, rows_.end - rows_.begin, panel.data + k * panel.stride, panel.stride, depth,
                    buffers_.dh + rows_.begin * stride_ + block * kCols<T>, stride_, init,
                    static_cast<const T*>(nullptr), deal);
    }
  }

  static void differentiate(const typename Cell::template BackwardRow<T>& row, int64_t begin, int64_t end) {
    int64_t u = begin;
    for (; u + Vec<T>::kLanes <= end; u += Vec<T>::kLanes) Cell::backward(row, u, Vec<T>::kLanes);
    if (u < end) Cell::backward(row, u, end - u);
  }

  void input_gradient(int64_t t0, int64_t steps) {
    if (!p_.grad_x) return;
    const int64_t depth = Cell::kGates * p_.hidden;
    const auto rows = team_.split(steps * p_.batch, kTileRows);
    for (int64_t m = rows.begin; m < rows.end; m += kBlockRows)
      for (int64_t k = 0; k < depth; k += kDepthInCache<T>)
        input_gradient_block(p_.grad_x + (t0 * p_.batch + m) * p_.input_size, m, std::min(kBlockRows, rows.end - m), k,
                             std::min(kDepthInCache<T>, depth - k));
  }

  // Adds the part of gate rows [k, k + depth) to `count` rows of grad_x, from row m of the chunk on.
  void input_gradient_block(T* grad_x, int64_t m, int64_t count, int64_t k, int64_t depth) {
    const int deal = accumulators(p_.seq_len * p_.batch);
    T* edge = buffers_.edge + team_.rank * kBlockRows * kCols<T>;
    for (int64_t col = 0; col < p_.input_size; col += kCols<T>) {
      const int64_t cols = std::min(kCols<T>, p_.input_size - col);
      const bool whole = cols == kCols<T>;
      const auto panel = this->panel(buffers_.panels_ih, p_.w_ih, p_.input_size, col / kCols<T>);
      panel_product(static_cast<const T*>(d_gates(m) + k), gates_stride_, count, panel.data + k * panel.stride,
                    panel.stride, depth, whole ? grad_x + col : edge, whole ? p_.input_size : kCols<T>,
                    k == 0 ? Init::kZero : Init::kAccumulate, static_cast<const T*>(nullptr), deal);
      // The last, partial panel is summed up aside, since a tile writes whole vectors.
      if (!whole && k + depth == Cell::kGates * p_.hidden)
        for (int64_t r = 0; r < count; ++r) std::copy_n(edge + r * kCols<T>, cols, grad_x + r * p_.input_size + col);
    }
  }

  void weight_gradients(int64_t t0, int64_t steps, bool accumulate) {
    const int64_t depth = steps * p_.batch, row = t0 * p_.batch;
    const auto product = [&](int slot, int64_t gates, const T* b, int64_t b_stride, int64_t width, T* grad,
                             const GemmBuffers<T>& buffers) {
      gemm<T>({gates * p_.hidden, width, depth, d_gates(0) + slot * p_.hidden, gates_stride_, true, b, b_stride, false,
               grad, width, accumulate},
              buffers, team_);
      team_.barrier();
    };
    if (p_.grad_w_ih)
      product(0, Cell::kGates, p_.x + row * p_.input_size, p_.input_size, p_.input_size, p_.grad_w_ih,
              buffers_.gemm_ih);
    if (!p_.grad_w_hh) return;
    for (const auto& run : Cell::kStateRuns)
      product(run.slot, run.count, p_.reserve + (row * Cell::kReserve + Cell::kHiddenKept) * p_.hidden,
              Cell::kReserve * p_.hidden, p_.hidden, p_.grad_w_hh + run.gate * p_.hidden * p_.hidden, buffers_.gemm_hh);
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
    const int64_t begin = blocks_.begin * kCols<T>, end = std::min(p_.hidden, blocks_.end * kCols<T>);
    for (int64_t b = rows_.begin; b < rows_.end; ++b) {
      if (p_.grad_h0)
        std::copy(buffers_.dh + b * stride_ + begin, buffers_.dh + b * stride_ + end,
                  p_.grad_h0 + b * p_.hidden + begin);
      if (p_.grad_c0)
        std::copy(buffers_.dc + b * stride_ + begin, buffers_.dc + b * stride_ + end,
                  p_.grad_c0 + b * p_.hidden + begin);
    }
  }

  const RecurrentBackwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const BackwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_, blocks_;
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
