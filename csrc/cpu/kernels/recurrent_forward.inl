// The time loop forward: per chunk of steps the input projection, which leaves sums with biases in `gates`; then per
// step the recurrent product on top of them and the activations.
#pragma once

#include "cpu/kernels/recurrent_layout.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Up to this many rows of the batch a step waits for the weights, and their panels stay in bfloat16; beyond, it waits
// for the arithmetic, and widening them again and again would add to it.
constexpr int64_t kNarrowRowsAtMost = 4;
// Up to this many rows of a single step, weights of another type than T are packed panel by panel as they are wanted.
constexpr int64_t kNarrowRowsInPlace = 48;

// How many rows of this depth stay in L2 while panel after panel of weights passes by.
template <class T>
int64_t rows_in_cache(int64_t depth) {
  constexpr int64_t kElements = (192 << 10) / sizeof(T);
  return std::max<int64_t>(kElements / std::max<int64_t>(depth, 1) / kTileRows, 4) * kTileRows;
}

// What meets panels of P, of weights stored as S.
template <class S, class P>
using OperandFor = std::conditional_t<kSplit<Operand<S>> && !kSplit<P>, Compute<S>, Operand<S>>;

// P, Q: what panels of weights hold, of the input's and the state's: S or its Compute<S>, or floats that are split.
template <class S, class P, class Q = P>
struct ForwardBuffers {
  using T = Compute<S>;
  using X = OperandFor<S, P>;  // what products take of x
  using E = OperandFor<S, Q>;  // and of h
  // Whether tensors and products hold numbers of one type.
  static constexpr bool kNumbers = std::is_same_v<S, T> && !kSplit<X>;

  P* panels_ih;  // [block][gate][I][kCols]
  Q* panels_hh;  // [block][gate][H][kCols]
  T* bias;       // [block][slot][kCols]: what a slot starts from
  E* h[2];       // (B, padded H): state before and after a step
  T* c;          // (B, padded H)
  X* x;          // [row of the chunk][I, in whole pairs], where rows of the input are copied
  T* gates[2];   // [block][row of the chunk][slot][kCols]; two, of chunks in turn, where units are shared
  P* late;       // per member: max(I, H) x kCols, a panel packed when it is wanted, where S is not T
  T *turned_x, *turned_h, *sums;  // per member, of a single step's rows: RowGroups of x and h, their product's sums

  template <class Cell>
  void take_weights(Workspace& workspace, const RecurrentForwardParams<S>& p) {
    const RecurrentSizes<T> sizes(p.hidden);
    panels_ih = workspace.take<P>(sizes.blocks * Cell::kGates * panel_depth<P>(p.input_size) * kCols<T>);
    panels_hh = workspace.take<Q>(sizes.blocks * Cell::kGates * panel_depth<Q>(p.hidden) * kCols<T>);
  }
  void take_bias(Workspace& workspace, const RecurrentForwardParams<S>& p) {
    const RecurrentSizes<T> sizes(p.hidden);
    bias = workspace.take<T>(sizes.blocks * sizes.slots_width);
  }
  void take_state(Workspace& workspace, const RecurrentForwardParams<S>& p) {
    for (auto& half : h) half = workspace.take<E>(p.batch * padded<E>(p.hidden));
    c = workspace.take<T>(p.batch * padded<T>(p.hidden));
  }
  FASTLM_NOINLINE void take_scratch(Workspace& workspace, const RecurrentForwardParams<S>& p, const RecurrentPlan& plan,
                                    bool copies) {
    const RecurrentSizes<T> sizes(p.hidden);
    if (broadcasts(p, plan)) {
      const int64_t rows = plan.threads * RowGroups::of<T>(p.batch).padded;
      turned_x = workspace.take<T>(rows * p.input_size);
      turned_h = workspace.take<T>(rows * p.hidden);
      sums = workspace.take<T>(rows * kCols<T>);
    } else if (plan.direct && kWidens<S>) {
      late = workspace.take<P>(plan.threads * late_size(p));
    }
    if (copies) x = workspace.take<X>(plan.forward_rows * x_stride(p));
    const int64_t size = sizes.blocks * plan.forward_rows * sizes.slots_width;
    gates[0] = workspace.take<T>(size);
    gates[1] = plan.split_batch ? gates[0] : workspace.take<T>(size);
  }

  template <class Cell>
  FASTLM_NOINLINE static ForwardBuffers take(Workspace& workspace, const RecurrentForwardParams<S>& p,
                                             const RecurrentPlan& plan) {
    ForwardBuffers buffers{};
    if (!plan.direct) buffers.template take_weights<Cell>(workspace, p);
    buffers.take_bias(workspace, p);
    buffers.take_state(workspace, p);
    buffers.take_scratch(workspace, p, plan, copies_input<X>(p));
    return buffers;
  }
  // Whether a single step's rows are turned to meet weights in place. By the batch, not a member's rows: sums must not
  // depend on how many share them.
  static bool broadcasts(const RecurrentForwardParams<S>& p, const RecurrentPlan& plan) {
    return kNumbers && plan.direct && StepRows(p).steps() == 1 &&
           !dot_is_faster<S>(p.batch, std::min(p.input_size, p.hidden));
  }
  static int64_t x_stride(const RecurrentForwardParams<S>& p) {
    return kSplit<X> ? row_stride<X>(p.input_size) : panel_depth<X>(p.input_size);
  }
  static int64_t late_size(const RecurrentForwardParams<S>& p) {
    return panel_depth<P>(std::max(p.input_size, p.hidden)) * kCols<T>;
  }
};

template <class S, class P, class Cell, class Q = P>
class ForwardPass {
 public:
  using Buffers = ForwardBuffers<S, P, Q>;
  using T = typename Buffers::T;
  using X = typename Buffers::X;
  using E = typename Buffers::E;
  ForwardPass(const RecurrentForwardParams<S>& p, const RecurrentPlan& plan, const Buffers& buffers, const Team& team)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        team_(team),
        sizes_(p.hidden),
        rows_(p),
        own_(plan.split_batch ? rows_.split(team) : Team::Range{0, p.batch}),
        spread_(plan.split_batch && team.size > 1),
        x_stride_(Buffers::x_stride(p)),
        h_stride_(padded<E>(p.hidden)),
        c_stride_(padded<T>(p.hidden)),
        streams_output_(!kWidens<S> && streams(p.output, rows_.all(), p.hidden)),
        streams_reserve_(streams(p.reserve, rows_.all() * Cell::kReserve, p.hidden)) {}

  void run() {
    if (!plan_.direct) pack_weights(p_.w_ih, p_.w_hh);
    start_bias();
    start_state();
    for (S* tensor : {p_.output, p_.cells}) rows_.clear_padding(tensor, p_.hidden, team_);
    team_.barrier();
    run_steps();
    if (!plan_.split_batch) team_.barrier();
    finish_state();
  }

  // What a Stream does once, and what it does every time; both end without a barrier.
  template <class W>
  void prepare_weights(const W* w_ih, const W* w_hh) {
    pack_weights(w_ih, w_hh);
    start_bias();
  }
  FASTLM_NOINLINE void run_steps() {
    int64_t last, chunks = 0;
    for (int64_t first = 0; first < rows_.steps(); first = last, ++chunks) {
      last = spread_ ? std::min(rows_.steps(), first + plan_.forward_rows / p_.batch)
                     : rows_.chunk_end(first, plan_.forward_rows);
      run_chunk({first, last, buffers_.gates[chunks % 2]});
    }
    stream_fence();
  }

 private:
  using Row = ForwardRow<S, E>;
  struct Chunk {
    int64_t first, last;  // steps
    T* gates;
  };

  void run_chunk(const Chunk& chunk) {
    if (buffers_.x) copy_input(chunk);
    if (rows_.steps() == 1) {
      const auto rows = active(0);
      if constexpr (Buffers::kNumbers)
        if (turned_x()) {
          const auto turn = [&](const T* from, int64_t stride, int64_t width, T* to) {
            turn_rows(RowGroups::of<T>(rows.end - rows.begin), from, stride, width, 0, width, to);
          };
          turn(input(chunk, 0, rows.begin), x_stride_, p_.input_size, turned_x());
          turn(buffers_.h[0] + rows.begin * h_stride_, h_stride_, p_.hidden, turned_h());
        }
      return for_blocks(false, [&](int64_t block) {
        project_block(chunk, row_of(chunk, 0) + rows.begin, input(chunk, 0, rows.begin), rows.end - rows.begin, block);
        recurrent_block(chunk, 0, block);
      });
    }
    project_input(chunk);
    for (int64_t step = chunk.first; step < chunk.last; ++step) {
      // The last step of a chunk needs none behind it: the next chunk's sums lie elsewhere.
      if (!plan_.split_batch) team_.barrier();
      for_blocks(step % 2, [&](int64_t block) { recurrent_block(chunk, step, block); });
    }
  }

  // A step's first row in the chunk's buffers. Packed; or, where members that share the batch work on chunks of their
  // own accord, a full batch apart, so that a member's rows are no other's in the next chunk.
  int64_t row_of(const Chunk& chunk, int64_t step) const {
    const int64_t t = rows_.time(step), t0 = rows_.time(p_.reverse ? chunk.last - 1 : chunk.first);
    return spread_ ? (t - t0) * p_.batch : rows_.first(t) - rows_.first(t0);
  }
  // The input of a step from sequence b on.
  const X* input(const Chunk& chunk, int64_t step, int64_t b) const {
    if constexpr (std::is_same_v<S, X>)
      if (!buffers_.x) return p_.x + (rows_.first(rows_.time(step)) + b) * p_.input_size;
    return buffers_.x + (row_of(chunk, step) + b) * x_stride_;
  }
  // The slots of a block from a row of the chunk on.
  T* slots(const Chunk& chunk, int64_t block, int64_t row) const {
    return chunk.gates + (block * plan_.forward_rows + row) * sizes_.slots_width;
  }
  const T* bias(int64_t block, int slot) const { return buffers_.bias + block * sizes_.slots_width + slot * kCols<T>; }
  int64_t units_of(int64_t block) const { return std::min(kCols<T>, p_.hidden - block * kCols<T>); }
  Team::Range active(int64_t step) const { return rows_.active(step, own_); }

  template <class Body>
  void for_blocks(bool backwards, const Body& body) {
    if (!plan_.split_batch) return team_.share(sizes_.blocks, backwards, body);
    for (int64_t i = 0; i < sizes_.blocks; ++i) body(backwards ? sizes_.blocks - 1 - i : i);
  }

  template <class W>
  FASTLM_NOINLINE void pack_weights(const W* w_ih, const W* w_hh) {
    const auto range = team_.split(sizes_.blocks * Cell::kGates);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int64_t block = i / Cell::kGates, gate = i % Cell::kGates;
      const int64_t row = gate * p_.hidden + block * kCols<T>, units = units_of(block);
      pack_transposed(w_ih + row * p_.input_size, p_.input_size, p_.input_size, units,
                      buffers_.panels_ih + i * panel_depth<P>(p_.input_size) * kCols<T>);
      pack_transposed(w_hh + row * p_.hidden, p_.hidden, p_.hidden, units,
                      buffers_.panels_hh + i * panel_depth<Q>(p_.hidden) * kCols<T>);
    }
  }

  FASTLM_NOINLINE void start_bias() {
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
    for (int64_t i = own.begin; i < own.end; ++i) {
      const auto given = [&](const S* state) {
        return state && !rows_.reset(0, i) ? state + rows_.sequence(i) * p_.hidden : nullptr;
      };
      E* h = buffers_.h[rows_.initial_half(i)] + i * h_stride_;
      copy_values(given(p_.h0), h, p_.hidden);
      fill_up(h, p_.hidden, panel_depth<E>(p_.hidden));
      if (!Cell::kHasCellState) continue;
      T* c = buffers_.c + i * c_stride_;
      copy_values(given(p_.c0), c, p_.hidden);
      std::fill(c + p_.hidden, c + c_stride_, T(0));  // whole vectors are worked on
    }
  }

  // slots (rows) = init + a (rows, depth) times the weights of one block and gate, packed or in place; `turned`: a as
  // turn_rows() leaves it, or null.
  template <class A, class W>
  void product(const A* a, int64_t a_stride, const T* turned, int64_t rows, const W* panels, const S* weights,
               int64_t depth, int64_t block, int gate, T* slots, Init init, const T* bias, int deal) {
    const W* panel = panels + (block * Cell::kGates + gate) * panel_depth<W>(depth) * kCols<T>;
    const W* next = panel + panel_depth<W>(depth) * kCols<T>;
    // Nothing that has panels of another type is direct.
    if constexpr (std::is_same_v<P, S>)
      if (plan_.direct) {
        const S* stored = weights + (gate * p_.hidden + block * kCols<T>)*depth;
        const int64_t units = units_of(block);
        if constexpr (std::is_same_v<S, T>)
          if (turned)
            return broadcast_product<T>(RowGroups::of<T>(rows),
                                        {turned, stored, depth, units, depth, slots, sizes_.slots_width, init, bias,
                                         part(buffers_.sums, kCols<T>)});
        // By the batch, as above.
        if (!kWidens<S> || dot_is_faster<S>(p_.batch, depth))
          return dot_product<S, A>({a, a_stride, stored, depth, units, depth, slots, sizes_.slots_width, init, bias,
                                    dot_rows_ahead(weight_bytes())},
                                   rows);
        P* late = buffers_.late + team_.rank * Buffers::late_size(p_);
        pack_transposed(stored, depth, depth, units, late);
        panel = late;
        next = stored_after(weights, depth, block, gate);
      }
    rows_times_panel(a, a_stride, rows, panel, units_of(block), depth, slots, sizes_.slots_width, init, bias, deal,
                     next);
  }

  int64_t weight_bytes() const {
    return Cell::kGates * p_.hidden * (p_.input_size + p_.hidden) * static_cast<int64_t>(sizeof(S));
  }

  // This member's part of a buffer for a single step's rows, so wide; null where there is none.
  T* part(T* all, int64_t width) const {
    return all ? all + team_.rank * RowGroups::of<T>(p_.batch).padded * width : nullptr;
  }
  T* turned_x() const { return part(buffers_.turned_x, p_.input_size); }
  T* turned_h() const { return part(buffers_.turned_h, p_.hidden); }

  // What is packed after the weights of a gate: another gate's, then the state's after the input's of a block.
  const S* stored_after(const S* weights, int64_t depth, int64_t block, int gate) const {
    if (gate + 1 < Cell::kGates) return weights + ((gate + 1) * p_.hidden + block * kCols<T>)*depth;
    return weights == p_.w_ih ? p_.w_hh + block * kCols<T> * p_.hidden
                              : p_.w_ih + (block + 1) * kCols<T> * p_.input_size;
  }

  // The chunk's rows of x that this member will read, or its share of them where all read all.
  void copy_input(const Chunk& chunk) {
    for (int64_t step = chunk.first; step < chunk.last; ++step) {
      const auto rows = plan_.split_batch ? active(step) : team_.split(rows_.at(rows_.time(step)));
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        X* to = buffers_.x + (row_of(chunk, step) + b) * x_stride_;
        copy_values(p_.x + rows_.place(rows_.first(rows_.time(step)) + b) * p_.input_size, to, p_.input_size);
        fill_up(to, p_.input_size, x_stride_);
      }
    }
    if (!plan_.split_batch) team_.barrier();
  }

  // Rows of all steps at once where they lie together, else step by step.
  void project_input(const Chunk& chunk) {
    if (spread_) {
      for (int64_t step = chunk.first; step < chunk.last; ++step) {
        const auto rows = active(step);
        project_rows(chunk, row_of(chunk, step) + rows.begin, input(chunk, step, rows.begin), rows.end - rows.begin);
      }
      return;
    }
    const auto range = rows_.rows(chunk.first, chunk.last);
    const int64_t rows = range.end - range.begin, together = rows_in_cache<T>(p_.input_size);
    const X* x = input(chunk, p_.reverse ? chunk.last - 1 : chunk.first, 0);
    for (int64_t row = 0; row < rows; row += together)
      project_rows(chunk, row, x + row * x_stride_, std::min(together, rows - row));
  }

  // These rows x of the input to the chunk's rows from `row` on.
  void project_rows(const Chunk& chunk, int64_t row, const X* x, int64_t count) {
    for_blocks(false, [&](int64_t block) { project_block(chunk, row, x, count, block); });
  }

  FASTLM_NOINLINE void project_block(const Chunk& chunk, int64_t row, const X* x, int64_t count, int64_t block) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int slot = Cell::input_slot(gate);
      product(x, x_stride_, turned_x(), count, buffers_.panels_ih, p_.w_ih, p_.input_size, block, gate,
              slots(chunk, block, row) + slot * kCols<T>, Init::kBias, bias(block, slot), accumulators(rows_.all()));
    }
  }

  FASTLM_NOINLINE void recurrent_block(const Chunk& chunk, int64_t step, int64_t block) {
    const auto range = active(step);
    if (range.begin == range.end) return;
    const StepView rows(*this, chunk, step, block);
    const E* h = buffers_.h[step % 2] + range.begin * h_stride_;
    fetch_results(rows, range, units_of(block));
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int slot = Cell::state_slot(gate);
      product(h, h_stride_, turned_h(), range.end - range.begin, buffers_.panels_hh, p_.w_hh, p_.hidden, block, gate,
              rows[range.begin].slots + slot * kCols<T>,
              slot == Cell::input_slot(gate) ? Init::kAccumulate : Init::kBias, bias(block, slot),
              accumulators(p_.batch));
    }
    const auto for_rows = [&](const auto& activate) {
      for (int64_t b = range.begin; b < range.end; ++b) activate(rows[b]);
    };
    if (units_of(block) == kCols<T>) {
      using V = Pack<T, kTileVecs>;
      for_rows([](const Row& row) FASTLM_LAMBDA_INLINE { Cell::template forward_gates<V>(row, 0, kCols<T>); });
      for_rows([](const Row& row) FASTLM_LAMBDA_INLINE { Cell::template forward_state<V>(row, 0, kCols<T>); });
    } else {
      for_rows([&](const Row& row) { activate_partial(row, units_of(block)); });
    }
    if (rows_.any_resets()) reset_states(step + 1, block, range);
  }

  static void activate_partial(const Row& row, int64_t units) {
    for (int64_t u = 0; u < units; u += Vec<T>::kLanes) {
      const int64_t n = std::min<int64_t>(Vec<T>::kLanes, units - u);
      Cell::template forward_gates<Vec<T>>(row, u, n);
      Cell::template forward_state<Vec<T>>(row, u, n);
    }
    // What fills up the last pair or group meets weights of zero, and would make NaN of them if it were not finite.
    if constexpr (kPairs<E>)
      if (units % 2) row.h_new[units] = E{};
    if constexpr (kSplit<E>)
      for (int64_t u = lanes_up<T>(units); u < panel_depth<E>(units); u += Vec<T>::kLanes)
        store_columns(Vec<T>::zero(), row.h_new, u, Vec<T>::kLanes);
  }

  // Where a sequence starts anew, the coming step finds zeros.
  void reset_states(int64_t step, int64_t block, Team::Range range) const {
    for (int64_t b = range.begin; b < range.end; ++b) {
      if (!rows_.reset(step, b)) continue;
      std::fill_n(buffers_.h[step % 2] + b * h_stride_ + block * kCols<T>, kCols<T>, E{});
      std::fill_n(buffers_.c + b * c_stride_ + block * kCols<T>, kCols<T>, T(0));
    }
  }

  // What the cell sees of a step's sequences in a block; pointers are worked out once, for rows are many and short.
  class StepView {
   public:
    StepView(const ForwardPass& pass, const Chunk& chunk, int64_t step, int64_t block)
        : first_(pass.rows_.first(pass.rows_.time(step))),
          place_(pass.rows_.in_place() ? nullptr : pass.p_.ragged->place + first_),
          h_stride_(pass.h_stride_),
          c_stride_(pass.c_stride_),
          slots_width_(pass.sizes_.slots_width),
          zero_{
              pass.slots(chunk, block, pass.row_of(chunk, step)),
              pass.buffers_.h[step % 2] + block * kCols<T>,
              pass.buffers_.h[(step + 1) % 2] + block * kCols<T>,
              pass.buffers_.c + block * kCols<T>,
              pass.p_.output + block * kCols<T>,
              pass.p_.cells ? pass.p_.cells + block * kCols<T> : nullptr,
              pass.p_.reserve ? pass.p_.reserve + first_ * Cell::kReserve * pass.p_.hidden + block * kCols<T> : nullptr,
              pass.p_.hidden,
              pass.streams_output_,
              pass.streams_reserve_} {}

    Row operator[](int64_t b) const {
      const int64_t place = (place_ ? place_[b] : first_ + b) * zero_.hidden;
      return {zero_.slots + b * slots_width_,
              zero_.h + b * h_stride_,
              zero_.h_new + b * h_stride_,
              zero_.c + b * c_stride_,
              zero_.output + place,
              zero_.cells ? zero_.cells + place : nullptr,
              zero_.reserve ? zero_.reserve + b * Cell::kReserve * zero_.hidden : nullptr,
              zero_.hidden,
              zero_.streams_output,
              zero_.streams_reserve};
    }

   private:
    const int64_t first_;
    const int64_t* const place_;
    const int64_t h_stride_, c_stride_, slots_width_;
    const Row zero_;  // of sequence 0, or the tensor's beginning
  };

  // Calls for the lines that the activations write, none of them in any cache yet, while the products run; but for
  // those that go past the caches.
  static void fetch_results(const StepView& rows, Team::Range range, int64_t units) {
    for (int64_t b = range.begin; b < range.end; ++b) {
      const Row row = rows[b];
      if (!row.streams_output) fetch_units(row.output, units);
      for (int column = 0; row.reserve && !row.streams_reserve && column < Cell::kReserve; ++column)
        fetch_units(row.reserve + column * row.hidden, units);
    }
  }
  template <class E>
  static void fetch_units(const E* p, int64_t units) {
    for (int64_t u = 0; u < units; u += 64 / sizeof(E)) __builtin_prefetch(p + u, 1);
  }

  void finish_state() {
    const auto own = plan_.split_batch ? own_ : team_.split(p_.batch);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t to = rows_.sequence(i) * p_.hidden;
      copy_values(buffers_.h[rows_.final_half(i)] + i * h_stride_, p_.h_n + to, p_.hidden);
      if (Cell::kHasCellState) copy_values<T>(buffers_.c + i * c_stride_, p_.c_n + to, p_.hidden);
    }
  }

  const RecurrentForwardParams<S>& p_;
  const RecurrentPlan& plan_;
  const Buffers& buffers_;
  const Team& team_;
  const RecurrentSizes<T> sizes_;
  const StepRows rows_;
  const Team::Range own_;
  const bool spread_;
  const int64_t x_stride_, h_stride_, c_stride_;
  const bool streams_output_, streams_reserve_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
