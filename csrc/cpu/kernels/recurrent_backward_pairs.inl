// The products of the time loop backward where they take pairs of BFloat16: gradients of the slots are rounded for
// them, as torch rounds these between its own steps; sums stay float32. Weights lie gate by gate,
// [panel][gate][H][kCols].
#pragma once

#include "cpu/kernels/recurrent_layout.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S, class Cell>
class BackwardPairs {
 public:
  using T = Compute<S>;
  using E = Operand<S>;
  using V = Vec<T>;
  static constexpr int64_t kRows = kOperandRows<E>;  // of a weight gradient, made at once
  static constexpr int64_t kDepth = 128;             // rows of the chunk added at once
#ifdef FASTLM_BFLOAT16_TILES
  static_assert(kDepth <= kColumnDepth);
#endif

  struct Buffers {
    E *panels_hh, *panels_ih;
    E *gates, *columns;      // gradients of the slots: [row][slot][H, in whole pairs]; [row / 2][slot][H, likewise][2]
    E* x;                    // [row][I], where rows of the input lie apart
    E *x_panels, *h_panels;  // [panel][row / 2][kCols][2], h: before the steps

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const RecurrentBackwardParams<S>& p,
                                        const RecurrentPlan& plan) {
      const int64_t panels_h = panels_for<T>(p.hidden), panels_i = panels_for<T>(p.input_size);
      const int64_t panel = Cell::kGates * panel_depth<E>(p.hidden) * kCols<T>, rows = even_up(plan.backward_rows);
      Buffers b{};
      b.panels_hh = workspace.take<E>(panels_h * panel);
      b.panels_ih = workspace.take<E>(p.grad_x ? panels_i * panel : 0);
      b.gates = workspace.take<E>(rows * stride(p));
      b.columns = workspace.take<E>(rows * stride(p));
      b.x = workspace.take<E>(StepRows(p).in_place() ? 0 : rows * p.input_size);
      b.x_panels = workspace.take<E>(p.grad_w_ih ? panels_i * rows * kCols<T> : 0);
      b.h_panels = workspace.take<E>(p.grad_w_hh ? panels_h * rows * kCols<T> : 0);
      return b;
    }
  };

  BackwardPairs(const RecurrentBackwardParams<S>& p, const RecurrentPlan& plan, const Buffers& buffers,
                const StepRows& rows, const Team& team)
      : p_(p),
        buffers_(buffers),
        rows_(rows),
        team_(team),
        stride_(stride(p)),
        slot_stride_(even_up(p.hidden)),
        panel_size_(panel_depth<E>(p.hidden) * kCols<T>),
        panel_step_(even_up(plan.backward_rows) * kCols<T>) {}

  void pack_weights() {
    const auto pack = [&](const S* weights, int64_t width, E* panels) {
      const auto own = team_.split(panels_for<T>(width) * Cell::kGates);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const int64_t col = i / Cell::kGates * kCols<T>, gate = i % Cell::kGates;
        pack_panel(weights + gate * p_.hidden * width + col, width, p_.hidden, std::min(kCols<T>, width - col),
                   panels + i * panel_size_, kCols<T>);
      }
    };
    pack(p_.w_hh, p_.hidden, buffers_.panels_hh);
    if (p_.grad_x) pack(p_.w_ih, p_.input_size, buffers_.panels_ih);
  }

  // Where the operands of a step's first row lie; row: where its gradients do.
  int64_t operand_row(int64_t, int64_t row) const { return row; }

  // Units [begin, end) of a row of the chunk, of all slots.
  void keep_operands(int64_t row, const T* d_gates, int64_t begin, int64_t end) {
    E* to = buffers_.gates + row * stride_;
    for (int slot = 0; slot < kSlots; ++slot)
      for (int64_t u = begin; u < end; u += V::kLanes) {
        const int64_t n = std::min<int64_t>(V::kLanes, end - u);
        store_as(V::load_partial(d_gates + slot * p_.hidden + u, n), to + slot * slot_stride_ + u, n);
      }
    for (int slot = 0; end == p_.hidden && end < slot_stride_ && slot < kSlots; ++slot)
      to[slot * slot_stride_ + end] = E{};
  }

  // dh (rows, kCols of a block) = [dh +] gradients of the slots from `row` on times the recurrent weights.
  void carry_back(int64_t row, int64_t rows, int64_t block, T* dh, int64_t dh_stride) {
    times_weights(row, rows, buffers_.panels_hh + block * Cell::kGates * panel_size_, Cell::state_slot, dh, dh_stride,
                  Cell::kCarriesHidden);
  }
  // One panel of these rows' gradient of x.
  void input_gradient(int64_t row, int64_t rows, int64_t panel, T* to) {
    times_weights(row, rows, buffers_.panels_ih + panel * Cell::kGates * panel_size_, Cell::input_slot, to, kCols<T>,
                  false);
  }

  // Of the chunk's rows; sums have `width` rounded up to vectors.
  void weight_gradients(Team::Range rows, bool accumulate, T* grad_w_ih, T* grad_w_hh) {
    if (!grad_w_ih && !grad_w_hh) return;
    bring_together(rows);
    const int64_t count = rows.end - rows.begin, tiles = (p_.hidden + kRows - 1) / kRows;
    team_.share(Cell::kGates * tiles, false, [&](int64_t i) {
      const int64_t gate = i / tiles, unit = i % tiles * kRows;
      if (grad_w_ih)
        add_rows(gate, Cell::input_slot(gate), unit, count, buffers_.x_panels, p_.input_size, accumulate, grad_w_ih);
      if (grad_w_hh)
        add_rows(gate, Cell::state_slot(gate), unit, count, buffers_.h_panels, p_.hidden, accumulate, grad_w_hh);
    });
    team_.barrier();
  }

 private:
  static int64_t stride(const RecurrentBackwardParams<S>& p) { return row_stride<E>(kSlots * even_up(p.hidden)); }

  template <class SlotOf>
  void times_weights(int64_t row, int64_t rows, const E* panels, const SlotOf& slot_of, T* c, int64_t c_stride,
                     bool accumulate) {
    for (int gate = 0; gate < Cell::kGates; ++gate, panels += panel_size_)
      rows_times_panel<E, E, T>(buffers_.gates + row * stride_ + slot_of(gate) * slot_stride_, stride_, rows, panels,
                                kCols<T>, p_.hidden, c, c_stride,
                                accumulate || gate > 0 ? Init::kAccumulate : Init::kZero, nullptr, 1, panels);
  }

  // Pairs of rows, of the slots' gradients and of what they meet.
  void bring_together(Team::Range rows) {
    const int64_t count = rows.end - rows.begin;
    const auto own = team_.split(count, 2);
    pack_panel(buffers_.gates + own.begin * stride_, stride_, own.end - own.begin, kSlots * slot_stride_,
               buffers_.columns + own.begin * stride_, stride_);
    const S* x = p_.x + rows.begin * p_.input_size;
    if (!rows_.in_place()) {
      for (int64_t row = own.begin; row < own.end; ++row)
        std::copy_n(p_.x + rows_.place(rows.begin + row) * p_.input_size, p_.input_size,
                    buffers_.x + row * p_.input_size);
      x = buffers_.x;
      team_.barrier();
    }
    const T* h = p_.reserve + (rows.begin * Cell::kReserve + Cell::kHiddenKept) * p_.hidden;
    if (p_.grad_w_ih) pack_panels(x, p_.input_size, count, p_.input_size, buffers_.x_panels);
    if (p_.grad_w_hh) pack_panels(h, Cell::kReserve * p_.hidden, count, p_.hidden, buffers_.h_panels);
    team_.barrier();
  }
  template <class From>
  void pack_panels(const From* from, int64_t from_stride, int64_t rows, int64_t width, E* panels) {
    team_.share(panels_for<T>(width), false, [&](int64_t i) {
      pack_panel(from + i * kCols<T>, from_stride, rows, std::min(kCols<T>, width - i * kCols<T>),
                 panels + i * panel_step_, kCols<T>);
    });
  }

  // A tile of units of one gate.
  void add_rows(int64_t gate, int64_t slot, int64_t unit, int64_t count, const E* panels, int64_t width,
                bool accumulate, T* grad) {
    const int64_t grad_stride = lanes_up<T>(width);
    for (int64_t k = 0; k < count; k += kDepth)
      multiply<true>(std::min(kRows, p_.hidden - unit), std::min(kDepth, count - k), width,
                     PanelProduct<E>{buffers_.columns + k * stride_ + 2 * (slot * slot_stride_ + unit), 2 * stride_,
                                     panels + k * kCols<T>, kPairing<E> * kCols<T>, panel_step_,
                                     grad + (gate * p_.hidden + unit) * grad_stride, grad_stride},
                     accumulate || k > 0);
  }

  const RecurrentBackwardParams<S>& p_;
  const Buffers& buffers_;
  const StepRows& rows_;
  const Team& team_;
  const int64_t stride_, slot_stride_, panel_size_, panel_step_;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
