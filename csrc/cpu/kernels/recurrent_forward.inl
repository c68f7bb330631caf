// The time loop forward: per chunk of steps the input projection, which leaves sums with biases in `gates`; then per
// step the recurrent product on top of them and the activations.
#pragma once

#include "cpu/kernels/recurrent_layout.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// How many rows of this depth stay in L2 while panel after panel of weights passes by.
template <class T>
int64_t rows_in_cache(int64_t depth) {
  constexpr int64_t kElements = (192 << 10) / sizeof(T);
  return std::max<int64_t>(kElements / std::max<int64_t>(depth, 1) / kTileRows, 4) * kTileRows;
}
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
    copy_rows(p_.h0, p_.hidden, buffers_.h[0], stride_, own, p_.hidden);
    if (Cell::kHasCellState) copy_rows(p_.c0, p_.hidden, buffers_.c, stride_, own, p_.hidden);
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

  // Calls for the lines that the activations write, none of them in any cache yet, while the products run.
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
    copy_rows(h, stride_, p_.h_n, p_.hidden, own, p_.hidden);
    if (Cell::kHasCellState) copy_rows<T>(buffers_.c, stride_, p_.c_n, p_.hidden, own, p_.hidden);
  }

  const RecurrentForwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const ForwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_;
  const int64_t stride_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
