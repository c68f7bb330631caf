// The time loop backward: per step the gradients of the slots, `d_gates`, and the product that carries them to the step
// before; per chunk of steps the three large products for grad_x and the weight gradients, accumulated chunk by chunk.
#pragma once

#include "cpu/kernels/recurrent_layout.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// What depth of many rows stays in L2 while panel after panel of weights passes by.
template <class T>
constexpr int64_t kDepthInCache = 2 * kBlockDepth<T>;

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
    if (cols == kCols<T> && p_.seq_len * p_.batch <= kTileRows) return {data, width};
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
    copy_rows(p_.grad_h_n, p_.hidden, buffers_.dh, stride_, own, p_.hidden);
    if (Cell::kHasCellState) copy_rows(p_.grad_c_n, p_.hidden, buffers_.dc, stride_, own, p_.hidden);
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
    if (p_.grad_h0) copy_rows<T>(buffers_.dh, stride_, p_.grad_h0, p_.hidden, own, p_.hidden);
    if (p_.grad_c0) copy_rows<T>(buffers_.dc, stride_, p_.grad_c0, p_.hidden, own, p_.hidden);
  }

  const RecurrentBackwardParams<T>& p_;
  const RecurrentPlan& plan_;
  const BackwardBuffers<T>& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const Team::Range rows_;
  const int64_t stride_, gates_stride_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
