// The time loop backward: per step the gradients of the slots, `d_gates`, and the product that carries them to the step
// before; per chunk of steps the three large products for grad_x and the weight gradients, accumulated chunk by chunk.
#pragma once

#include "cpu/kernels/recurrent_backward_pairs.inl"
#ifdef FASTLM_FLOATS_ELSEWHERE
#include "cpu/kernels/recurrent_backward_split.inl"
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// What depth of many rows stays in L2 while panel after panel of weights passes by.
template <class T>
constexpr int64_t kDepthInCache = kDeep<T> / 2;

constexpr int kSumVecs = 4;  // columns summed together for the biases, so that whole cache lines are read

// The last slot's columns may be read kSumVecs at a time.
template <class T>
int64_t d_gates_stride(int64_t hidden) {
  return padded<T>(kSlots * hidden + kSumVecs * Vec<T>::kLanes);
}

// Products of operands that lie apart from the gradients.
#ifdef FASTLM_FLOATS_ELSEWHERE
template <class S, class Cell>
using BackwardApart = std::conditional_t<kSplit<Operand<S>>, BackwardSplit<Cell>, BackwardPairs<S, Cell>>;
#else
template <class S, class Cell>
using BackwardApart = BackwardPairs<S, Cell>;
#endif

// E: what products take, T or pairs of S, or floats that are split.
template <class S, class E, class Cell>
struct BackwardBuffers {
  using T = Compute<S>;
  T* panels_hh;  // [block][G*H][kCols]
  T* panels_ih;  // [panel of I][G*H][kCols]
  T* d_gates;    // [row of the chunk](4H, padded)
  T* dh;         // (B, padded H): gradient carried to the step before
  T* dc;         // (B, padded H)
  T* x;          // [row of the chunk][I], where rows of the input are copied
  T* edges;      // per member: kBlockRows x kCols for every panel of grad_x that is no place to sum in
  T* late;       // per member: kDepthInCache x kCols, a panel packed when it is wanted
  // Where the weight gradients are summed: the results themselves, or a wider form of them.
  T *grad_w_ih, *grad_w_hh, *grad_b_ih, *grad_b_hh;
  GemmBuffers<T> gemm;
  typename BackwardApart<S, Cell>::Buffers apart;

  FASTLM_NOINLINE static BackwardBuffers take(Workspace& workspace, const RecurrentBackwardParams<S>& p,
                                              const RecurrentPlan& plan) {
    const int64_t gates = Cell::kGates * p.hidden, state = p.batch * padded<T>(p.hidden);
    const int64_t rows = plan.backward_rows;
    const bool weights = p.grad_w_ih || p.grad_w_hh;
    const int64_t panels_h = panels_for<T>(p.hidden), panels_i = panels_for<T>(p.input_size);
    BackwardBuffers buffers{};
    if constexpr (kApart<E>) buffers.apart = decltype(apart)::take(workspace, p, plan);
    if (!plan.direct && !state_apart(plan)) {
      buffers.panels_hh = workspace.take<T>(panels_h * gates * kCols<T>);
      if (p.grad_x && !kSplit<E>) buffers.panels_ih = workspace.take<T>(panels_i * gates * kCols<T>);
    }
    buffers.d_gates = workspace.take<T>(rows * d_gates_stride<T>(p.hidden));
    buffers.dh = workspace.take<T>(state);
    buffers.dc = workspace.take<T>(state);
    if (!kPairs<E> && copies_input<T>(p) && weights) buffers.x = workspace.take<T>(rows * p.input_size);
    buffers.edges = workspace.take<T>(plan.threads * edges_size(p));
    if (plan.direct) buffers.late = workspace.take<T>(plan.threads * kDepthInCache<T> * kCols<T>);
    if (!kApart<E> && weights) buffers.gemm = GemmBuffers<T>::take(workspace, panels_h + panels_i, rows, plan.threads);
    const auto sums = [&](S* grad, int64_t n) -> T* {
      if constexpr (kWidens<S>)
        return grad ? workspace.take<T>(n) : nullptr;
      else
        return grad;
    };
    buffers.grad_w_ih = sums(p.grad_w_ih, gates * sums_stride(p.input_size));
    buffers.grad_w_hh = sums(p.grad_w_hh, gates * sums_stride(p.hidden));
    buffers.grad_b_ih = sums(p.grad_b_ih, gates);
    buffers.grad_b_hh = sums(p.grad_b_hh, gates);
    return buffers;
  }
  // Of rows of weight gradients; products of pairs write whole vectors.
  static int64_t sums_stride(int64_t width) { return kPairs<E> ? lanes_up<T>(width) : width; }
  // Whether operands that meet the recurrent weights lie apart.
  static bool state_apart(const RecurrentPlan& plan) { return kPairs<E> || (kSplit<E> && plan.splits_state); }
  static int64_t edges_size(const RecurrentBackwardParams<S>& p) {
    return (copies_input<T>(p) ? panels_for<T>(p.input_size) : 1) * kBlockRows * kCols<T>;
  }
};

template <class S, class E, class Cell>
class BackwardPass {
 public:
  using T = Compute<S>;
  using Buffers = BackwardBuffers<S, E, Cell>;
  BackwardPass(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, const Buffers& buffers, const Team& team)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        team_(team),
        sizes_(p.hidden),
        rows_(p),
        own_(plan.split_batch ? rows_.split(team) : Team::Range{0, p.batch}),
        stride_(padded<T>(p.hidden)),
        gates_stride_(d_gates_stride<T>(p.hidden)),
        apart_(p, plan, buffers.apart, rows_, team) {}

  void run() {
    if (!Buffers::state_apart(plan_)) {
      if (!plan_.direct) pack_weights();
    } else if constexpr (kApart<E>) {
      apart_.pack_weights();
    }
    start_state();
    rows_.clear_padding(p_.grad_x, p_.input_size, team_);
    if (rows_.all() == 0) clear_weight_gradients();
    team_.barrier();
    // Steps in the order of forward are 0 .. T-1; backward takes chunks and steps from the last to the first.
    for (int64_t last = rows_.steps(); last > 0;) {
      const int64_t first = rows_.chunk_begin(last, plan_.backward_rows);
      const auto rows = rows_.rows(first, last);  // they lie in order of time
      if (buffers_.x) copy_input(rows);
      for_groups(false, [&](Blocks blocks) { differentiate(last - 1, rows.begin, blocks); });
      for (int64_t step = last - 1; step >= first; --step) {
        if (!plan_.split_batch) team_.barrier();
        for_groups(step % 2, [&](Blocks blocks) { carry_and_differentiate(step, first, rows.begin, blocks); });
      }
      team_.barrier();
      const bool accumulate = last < rows_.steps();
      input_gradient(rows);
      weight_gradients(rows, accumulate);
      bias_gradients(rows, accumulate);
      team_.barrier();
      last = first;
    }
    finish_state();
    if (kWidens<S>) finish_weight_gradients();
  }

 private:
  using Blocks = Team::Range;  // blocks of hidden units

  T* d_gates(int64_t chunk_row) const { return buffers_.d_gates + chunk_row * gates_stride_; }
  int64_t row_of(int64_t step) const { return rows_.first(rows_.time(step)); }  // a step's first, counted over all
  Team::Range active(int64_t step) const { return rows_.active(step, own_); }

  // A piece of weights (G*H, width): rows from k on, columns of one panel.
  struct Piece {
    const T* data;
    int64_t stride;
  };
  Piece piece(const T* packed, const S* weights, int64_t width, int64_t panel, int64_t k, int64_t depth) const {
    if (!plan_.direct) return {packed + (panel * Cell::kGates * p_.hidden + k) * kCols<T>, kCols<T>};
    const int64_t cols = std::min(kCols<T>, width - panel * kCols<T>);
    const S* data = weights + k * width + panel * kCols<T>;
    // In place where one tile reads it, and no other comes.
    if constexpr (!kWidens<S>)
      if (cols == kCols<T> && rows_.all() <= kTileRows) return {data, width};
    T* late = buffers_.late + team_.rank * kDepthInCache<T> * kCols<T>;
    pack_rows(data, width, depth, cols, late);
    return {late, kCols<T>};
  }

  void pack_weights() {
    const int64_t gates = Cell::kGates * p_.hidden;
    const auto pack = [&](const S* weights, int64_t width, T* panels) {
      const auto range = team_.split(panels_for<T>(width));
      for (int64_t i = range.begin; i < range.end; ++i)
        pack_rows(weights + i * kCols<T>, width, gates, std::min(kCols<T>, width - i * kCols<T>),
                  panels + i * gates * kCols<T>);
    };
    pack(p_.w_hh, p_.hidden, buffers_.panels_hh);
    if (buffers_.panels_ih) pack(p_.w_ih, p_.input_size, buffers_.panels_ih);
  }

  void start_state() {
    const auto own = team_.split(p_.batch);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const auto arriving = [&](const S* grad) {
        return grad && !rows_.reset(rows_.steps(), i) ? grad + rows_.sequence(i) * p_.hidden : nullptr;
      };
      copy_values(arriving(p_.grad_h_n), buffers_.dh + i * stride_, p_.hidden);
      if (Cell::kHasCellState) copy_values(arriving(p_.grad_c_n), buffers_.dc + i * stride_, p_.hidden);
    }
  }

  void copy_input(Team::Range rows) {
    const auto own = team_.split(rows.end - rows.begin);
    for (int64_t row = own.begin; row < own.end; ++row)
      copy_values(p_.x + rows_.place(rows.begin + row) * p_.input_size, buffers_.x + row * p_.input_size,
                  p_.input_size);
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

  // The gradients of a step's slots; `base`: the chunk's first row.
  void differentiate(int64_t step, int64_t base, Blocks blocks) {
    const int64_t begin = blocks.begin * kCols<T>, end = std::min(p_.hidden, blocks.end * kCols<T>);
    const auto range = active(step);
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t row = row_of(step) + b, place = rows_.place(row);
      differentiate_row(
          {p_.grad_output ? p_.grad_output + place * p_.hidden : nullptr,
           p_.grad_cells ? p_.grad_cells + place * p_.hidden : nullptr, p_.reserve + row * Cell::kReserve * p_.hidden,
           buffers_.dh + b * stride_, buffers_.dc + b * stride_, d_gates(row - base), p_.hidden},
          begin, end);
      if constexpr (kApart<E>)
        if (Buffers::state_apart(plan_))
          apart_.keep_operands(apart_.operand_row(step, row_of(step) - base) + b, d_gates(row - base), begin, end);
    }
  }

  FASTLM_NOINLINE static void differentiate_row(const BackwardRow<S>& row, int64_t begin, int64_t end) {
    int64_t u = begin;
    for (; u + kCols<T> <= end; u += kCols<T>) Cell::template backward<Pack<T, kTileVecs>>(row, u, kCols<T>);
    for (; u < end; u += Vec<T>::kLanes)
      Cell::template backward<Vec<T>>(row, u, std::min<int64_t>(Vec<T>::kLanes, end - u));
  }

  // Carries the gradient over a step, and differentiates the step before it unless that is in the next chunk.
  void carry_and_differentiate(int64_t step, int64_t first, int64_t base, Blocks blocks) {
    if (step > first) fetch_kept(step - 1, blocks);
    if (step > 0 || p_.grad_h0) carry_back(step, row_of(step) - base, blocks);
    if (rows_.any_resets()) reset_gradients(step, blocks);
    if (step > first) differentiate(step - 1, base, blocks);
  }

  // Where a sequence starts anew, nothing is carried to what was before.
  void reset_gradients(int64_t step, Blocks blocks) const {
    const int64_t begin = blocks.begin * kCols<T>, end = blocks.end * kCols<T>;
    const auto range = active(step);
    for (int64_t b = range.begin; b < range.end; ++b)
      if (rows_.reset(step, b))
        for (T* grad : {buffers_.dh, buffers_.dc})
          std::fill(grad + b * stride_ + begin, grad + b * stride_ + end, T(0));
  }

  // Calls for what `differentiate` will read, which lies in memory since forward.
  void fetch_kept(int64_t step, Blocks blocks) const {
    const int64_t begin = blocks.begin * kCols<T>, end = std::min(p_.hidden, blocks.end * kCols<T>);
    const auto range = active(step);
    for (int64_t b = range.begin; b < range.end; ++b) {
      const int64_t row = row_of(step) + b, place = rows_.place(row);
      for (int64_t u = begin; u < end; u += 64 / sizeof(T)) {
        for (int column = 0; column < Cell::kReserve; ++column)
          if (column != Cell::kHiddenKept || Cell::kCarriesHidden)
            __builtin_prefetch(p_.reserve + (row * Cell::kReserve + column) * p_.hidden + u);
        if (p_.grad_output) __builtin_prefetch(p_.grad_output + place * p_.hidden + u);
      }
    }
  }

  // dh (these blocks of a step) = [what bypasses the product +] d_gates, from `row` on, times the recurrent weights.
  void carry_back(int64_t step, int64_t row, Blocks blocks) {
    const auto range = active(step);
    if (Buffers::state_apart(plan_)) {
      if constexpr (kApart<E>)
        for (int64_t block = blocks.begin; range.begin < range.end && block < blocks.end; ++block)
          apart_.carry_back(apart_.operand_row(step, row) + range.begin, range.end - range.begin, block,
                            buffers_.dh + range.begin * stride_ + block * kCols<T>, stride_);
      return;
    }
    bool first = !Cell::kCarriesHidden;
    for (const auto& run : Cell::kRuns) {
      if (!run.state) continue;
      for (int64_t k = 0; k < run.count * p_.hidden; k += kDepthInCache<T>, first = false)
        carry_back_piece(range, d_gates(row + range.begin) + run.slot * p_.hidden + k, run.gate * p_.hidden + k,
                         std::min(kDepthInCache<T>, run.count * p_.hidden - k), first ? Init::kZero : Init::kAccumulate,
                         blocks);
    }
  }

  // The same for rows [k, k + depth) of the recurrent weights; a: their slots.
  FASTLM_NOINLINE void carry_back_piece(Team::Range range, const T* a, int64_t k, int64_t depth, Init init,
                                        Blocks blocks) {
    const int deal = accumulators(p_.batch);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const auto weights = piece(buffers_.panels_hh, p_.w_hh, p_.hidden, block, k, depth);
      const bool last = block + 1 == blocks.end;  // then the same block's next rows, or the group's first block, follow
      const int64_t ahead =
          last ? depth - (blocks.end - blocks.begin - 1) * Cell::kGates * p_.hidden : Cell::kGates * p_.hidden;
      panel_product(a, gates_stride_, range.end - range.begin, weights.data, weights.stride,
                    std::min(kCols<T>, p_.hidden - block * kCols<T>), depth,
                    buffers_.dh + range.begin * stride_ + block * kCols<T>, stride_, init,
                    static_cast<const T*>(nullptr), deal, weights.data + (plan_.direct ? 0 : ahead * kCols<T>));
    }
  }

  // Shared by rows, or by columns where rows are few.
  void input_gradient(Team::Range chunk) {
    if (!p_.grad_x) return;
    if constexpr (kSplit<E>) return apart_.input_gradients(chunk, d_gates(0), gates_stride_);
    const int64_t rows = chunk.end - chunk.begin, panels = panels_for<T>(p_.input_size);
    if (plan_.direct)
      return team_.share(panels, false, [&](int64_t i) { input_gradient_block(chunk.begin, {0, rows}, {i, i + 1}); });
    team_.share((rows + kBlockRows - 1) / kBlockRows, false, [&](int64_t i) {
      input_gradient_block(chunk.begin, {i * kBlockRows, std::min(rows, (i + 1) * kBlockRows)}, {0, panels});
    });
  }

  // Rows are counted within the chunk, whose first is `base`.
  void input_gradient_block(int64_t base, Team::Range rows, Team::Range panels) {
    if constexpr (kPairs<E>) {
      T* sums = edge(0);
      for (int64_t i = panels.begin; i < panels.end; ++i) {
        apart_.input_gradient(rows.begin, rows.end - rows.begin, i, sums);
        write_input_gradient(base, rows, i, sums);
      }
      return;
    }
    const int64_t depth = Cell::kGates * p_.hidden;
    for (int64_t k = 0; k < depth; k += kDepthInCache<T>)
      for (int64_t i = panels.begin; i < panels.end; ++i)
        input_gradient_piece(base, rows, i, k, std::min(kDepthInCache<T>, depth - k));
  }

  // Adds the part of gate rows [k, k + depth) to one panel of these rows of grad_x.
  FASTLM_NOINLINE void input_gradient_piece(int64_t base, Team::Range rows, int64_t panel, int64_t k, int64_t depth) {
    const int64_t col = panel * kCols<T>, cols = std::min(kCols<T>, p_.input_size - col);
    const auto weights = piece(buffers_.panels_ih, p_.w_ih, p_.input_size, panel, k, depth);
    const auto sum_in = [&](T* sums, int64_t stride) {
      panel_product(static_cast<const T*>(d_gates(rows.begin) + k), gates_stride_, rows.end - rows.begin, weights.data,
                    weights.stride, cols, depth, sums, stride, k == 0 ? Init::kZero : Init::kAccumulate,
                    static_cast<const T*>(nullptr), accumulators(rows_.all()),
                    weights.data + (plan_.direct ? 0 : Cell::kGates * p_.hidden * kCols<T>));
    };
    const bool aside = copies_input<T>(p_);
    if constexpr (!kWidens<S>)
      if (!aside && cols == kCols<T>)
        return sum_in(p_.grad_x + (base + rows.begin) * p_.input_size + col, p_.input_size);
    // Aside where rows lie elsewhere or in another type, and for the last, partial panel: a tile writes whole vectors.
    T* sums = edge(aside ? panel : 0);
    sum_in(sums, kCols<T>);
    if (k + depth == Cell::kGates * p_.hidden) write_input_gradient(base, rows, panel, sums);
  }

  T* edge(int64_t i) const { return buffers_.edges + team_.rank * Buffers::edges_size(p_) + i * kBlockRows * kCols<T>; }
  void write_input_gradient(int64_t base, Team::Range rows, int64_t panel, const T* sums) {
    const int64_t col = panel * kCols<T>, cols = std::min(kCols<T>, p_.input_size - col);
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += kCols<T>)
      copy_values(sums, p_.grad_x + rows_.place(base + row) * p_.input_size + col, cols);
  }

  // The slots' gradients meet x and the states before the steps; both products of a run share their packing.
  void weight_gradients(Team::Range rows, bool accumulate) {
    if constexpr (kPairs<E>) return apart_.weight_gradients(rows, accumulate, buffers_.grad_w_ih, buffers_.grad_w_hh);
    const T* h = p_.reserve + (rows.begin * Cell::kReserve + Cell::kHiddenKept) * p_.hidden;
    const T* x = buffers_.x;
    if constexpr (!kWidens<S>)
      if (!x) x = p_.x + rows.begin * p_.input_size;
    if constexpr (kSplit<E>)
      return apart_.weight_gradients(rows.end - rows.begin, d_gates(0), gates_stride_, x, h, accumulate);
    for (const auto& run : Cell::kRuns) {
      GemmParams<T> parts[2];
      int count = 0;
      const auto add = [&](const T* b, int64_t b_stride, int64_t width, T* grad) {
        parts[count++] = {run.count * p_.hidden,
                          width,
                          rows.end - rows.begin,
                          d_gates(0) + run.slot * p_.hidden,
                          gates_stride_,
                          true,
                          b,
                          b_stride,
                          false,
                          grad + run.gate * p_.hidden * width,
                          width,
                          accumulate,
                          nullptr};
      };
      if (run.input && buffers_.grad_w_ih) add(x, p_.input_size, p_.input_size, buffers_.grad_w_ih);
      if (run.state && buffers_.grad_w_hh) add(h, Cell::kReserve * p_.hidden, p_.hidden, buffers_.grad_w_hh);
      if (count == 0) continue;
      gemm(Products<T>{parts, count}, buffers_.gemm, team_);
      team_.barrier();
    }
  }

  template <class Body>
  void for_weight_gradients(const Body& body) {
    const int64_t gates = Cell::kGates * p_.hidden;
    const auto each = [&](T* sums, S* grad, int64_t rows, int64_t width, int64_t stride) {
      const auto own = team_.split(rows);
      for (int64_t i = own.begin; grad && i < own.end; ++i) body(sums + i * stride, grad + i * width, width);
    };
    each(buffers_.grad_w_ih, p_.grad_w_ih, gates, p_.input_size, Buffers::sums_stride(p_.input_size));
    each(buffers_.grad_w_hh, p_.grad_w_hh, gates, p_.hidden, Buffers::sums_stride(p_.hidden));
    each(buffers_.grad_b_ih, p_.grad_b_ih, 1, gates, gates);
    each(buffers_.grad_b_hh, p_.grad_b_hh, 1, gates, gates);
  }
  void clear_weight_gradients() {
    for_weight_gradients([](T* sums, S*, int64_t n) { std::fill_n(sums, n, T(0)); });
  }
  void finish_weight_gradients() {
    for_weight_gradients([](const T* sums, S* grad, int64_t n) { copy_values(sums, grad, n); });
  }

  void bias_gradients(Team::Range rows, bool accumulate) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      T* ih = buffers_.grad_b_ih ? buffers_.grad_b_ih + gate * p_.hidden : nullptr;
      T* hh = buffers_.grad_b_hh ? buffers_.grad_b_hh + gate * p_.hidden : nullptr;
      const auto own = team_.split(p_.hidden, kSumVecs * Vec<T>::kLanes);
      if (ih) column_sum(rows.end - rows.begin, Cell::input_slot(gate), own, ih, accumulate);
      if (hh && ih && Cell::state_slot(gate) == Cell::input_slot(gate))
        std::copy(ih + own.begin, ih + own.end, hh + own.begin);
      else if (hh)
        column_sum(rows.end - rows.begin, Cell::state_slot(gate), own, hh, accumulate);
    }
  }

  // Sum over the chunk's rows of some columns of a slot; in blocks of rows, for accuracy over many of them.
  FASTLM_NOINLINE void column_sum(int64_t rows, int slot, Team::Range columns, T* sums, bool accumulate) {
    using V = Vec<T>;
    using Wide = Pack<T, kSumVecs>;
    constexpr int64_t kBlock = 32;
    for (int64_t u = columns.begin; u < columns.end; u += Wide::kLanes) {
      Wide total = Wide::broadcast(0);
      for (int64_t row = 0; row < rows;) {
        Wide block = Wide::broadcast(0);
        for (const int64_t end = std::min(rows, row + kBlock); row < end; ++row)
          block = block + Wide::load(d_gates(row) + slot * p_.hidden + u);
        total = total + block;
      }
      for (int v = 0; v < kSumVecs; ++v) {
        const int64_t first = u + v * V::kLanes, n = std::clamp<int64_t>(columns.end - first, 0, V::kLanes);
        const V sum = accumulate ? total.parts[v] + V::load_partial(sums + first, n) : total.parts[v];
        sum.store_partial(sums + first, n);
      }
    }
  }

  void finish_state() {
    const auto own = team_.split(p_.batch);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t to = rows_.sequence(i) * p_.hidden;
      if (p_.grad_h0) copy_values<T>(buffers_.dh + i * stride_, p_.grad_h0 + to, p_.hidden);
      if (p_.grad_c0) copy_values<T>(buffers_.dc + i * stride_, p_.grad_c0 + to, p_.hidden);
    }
  }

  const RecurrentBackwardParams<S>& p_;
  const RecurrentPlan& plan_;
  const Buffers& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const StepRows rows_;
  const Team::Range own_;
  const int64_t stride_, gates_stride_;
  BackwardApart<S, Cell> apart_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
