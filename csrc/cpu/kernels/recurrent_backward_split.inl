// The products of the time loop backward where floats are split for them. The gradients of the slots stay floats; what
// carries them to the step before is split as they are made, the rest in the products of a chunk. Recurrent weights lie
// gate by gate, [panel][gate][H][kCols].
#pragma once

#include "cpu/kernels/recurrent_layout.inl"
#include "cpu/kernels/split_gemm.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class Cell>
class BackwardSplit {
 public:
  using T = float;
  using E = SplitFloat;
  using Params = RecurrentBackwardParams<float>;

  struct Buffers {
    E* panels_hh;
    E* gates;   // gradients of the slots of a step and the one before: [row][slot][H, in whole groups]
    T* grad_x;  // [row of the chunk][I], where rows of the input lie apart
    SplitGemmBuffers gemm;

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const Params& p, const RecurrentPlan& plan) {
      const int64_t panels_h = panels_for<T>(p.hidden), gates = Cell::kGates * p.hidden;
      Buffers b{};
      if (plan.splits_state) {
        b.panels_hh = workspace.take<E>(panels_h * Cell::kGates * panel_depth<E>(p.hidden) * kCols<T>);
        b.gates = workspace.take<E>(2 * p.batch * stride(p));
      }
      if (p.grad_x && !StepRows(p).in_place()) b.grad_x = workspace.take<T>(plan.backward_rows * p.input_size);
      b.gemm = SplitGemmBuffers::take(workspace, panels_h + panels_for<T>(p.input_size),
                                      std::max(plan.backward_rows, gates), plan.threads);
      return b;
    }
  };

  BackwardSplit(const Params& p, const RecurrentPlan&, const Buffers& buffers, const StepRows& rows, const Team& team)
      : p_(p),
        buffers_(buffers),
        rows_(rows),
        team_(team),
        stride_(stride(p)),
        slot_stride_(panel_depth<E>(p.hidden)),
        panel_size_(panel_depth<E>(p.hidden) * kCols<T>) {}

  void pack_weights() {
    const auto own = team_.split(panels_for<T>(p_.hidden) * Cell::kGates);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const int64_t col = i / Cell::kGates * kCols<T>, gate = i % Cell::kGates;
      pack_panel(p_.w_hh + gate * p_.hidden * p_.hidden + col, p_.hidden, p_.hidden,
                 std::min(kCols<T>, p_.hidden - col), buffers_.panels_hh + i * panel_size_, kCols<T>);
    }
  }

  // Where the operands of a step's first row lie; row: where its gradients do.
  int64_t operand_row(int64_t step, int64_t) const { return step % 2 * p_.batch; }

  // Units [begin, end) of a row, of all slots.
  void keep_operands(int64_t row, const T* d_gates, int64_t begin, int64_t end) {
    copy_rows(d_gates + begin, p_.hidden, kSlots, end - begin, buffers_.gates + row * stride_ + begin, slot_stride_);
  }

  // dh (rows, kCols of a block) = [dh +] gradients of the slots from `row` on times the recurrent weights.
  void carry_back(int64_t row, int64_t rows, int64_t block, T* dh, int64_t dh_stride) {
    const E* panel = buffers_.panels_hh + block * Cell::kGates * panel_size_;
    for (int gate = 0; gate < Cell::kGates; ++gate, panel += panel_size_)
      split_rows_times_panel(buffers_.gates + row * stride_ + Cell::state_slot(gate) * slot_stride_, stride_, rows,
                             panel, pair_step(p_.hidden), std::min(kCols<T>, p_.hidden - block * kCols<T>), p_.hidden,
                             dh, dh_stride, Cell::kCarriesHidden || gate > 0 ? Init::kAccumulate : Init::kZero,
                             nullptr);
  }

  // Of a chunk's rows, from their gradients of the slots; gates in order lie in the first slots.
  void input_gradients(Team::Range chunk, const T* d_gates, int64_t d_gates_stride) {
    const int64_t rows = chunk.end - chunk.begin, width = p_.input_size;
    T* to = buffers_.grad_x ? buffers_.grad_x : p_.grad_x + chunk.begin * width;
    const GemmParams<T> product{
        rows,  width,  Cell::kGates * p_.hidden, d_gates, d_gates_stride, false, p_.w_ih, width, false, to, width,
        false, nullptr};
    gemm(Products<T>{&product, 1}, std::array{RowRange{0, rows, {0, 0}}}, buffers_.gemm, team_);
    team_.barrier();
    if (!buffers_.grad_x) return;
    const auto own = team_.split(rows);
    for (int64_t row = own.begin; row < own.end; ++row)
      copy_values(to + row * width, p_.grad_x + rows_.place(chunk.begin + row) * width, width);
  }

  // All slots at once, so that x and h, the states before the steps, are split once.
  void weight_gradients(int64_t rows, const T* d_gates, int64_t d_gates_stride, const T* x, const T* h,
                        bool accumulate) {
    const bool wants_x = p_.grad_w_ih, wants_h = p_.grad_w_hh;
    const auto product = [&](const T* b, int64_t b_stride, int64_t width, T* to) {
      return GemmParams<T>{kSlots * p_.hidden, width, rows, d_gates, d_gates_stride, true,   b,
                           b_stride,           false, to,   width,   accumulate,     nullptr};
    };
    const GemmParams<T> parts[2] = {product(x, p_.input_size, p_.input_size, p_.grad_w_ih),
                                    product(h, Cell::kReserve * p_.hidden, p_.hidden, p_.grad_w_hh)};
    std::array<RowRange, kSlots> slots;
    for (auto& slot : slots) slot = {0, 0, {-1, -1}};
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const auto meets = [&](int slot, int part) {
        slots[slot].begin = slot * p_.hidden, slots[slot].rows = p_.hidden;
        slots[slot].to[part] = gate * p_.hidden;
      };
      if (wants_x) meets(Cell::input_slot(gate), 0);
      if (wants_h) meets(Cell::state_slot(gate), wants_x ? 1 : 0);
    }
    if (wants_x || wants_h)
      gemm(Products<T>{wants_x ? parts : parts + 1, wants_x + wants_h}, slots, buffers_.gemm, team_);
    team_.barrier();
  }

 private:
  static int64_t stride(const Params& p) { return row_stride<E>(kSlots * panel_depth<E>(p.hidden)); }

  const Params& p_;
  const Buffers& buffers_;
  const StepRows& rows_;
  const Team& team_;
  const int64_t stride_, slot_stride_, panel_size_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
