// cpu/stream.h on the time loop forward: weights packed once, states that stay where the last step left them.
#pragma once

#include <new>

#include "cpu/kernels/recurrent_forward.inl"
#include "cpu/stream.h"
#include "cpu/subnormals.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// The packed weights of all layers, shared by a stream and its clones.
template <class S, class P>
struct PackedStack {
  Workspace workspace;
  std::vector<ForwardBuffers<S, P>> layers;  // with nothing but weights and biases
  std::atomic<int> users{1};
};

// W: what the weights are rounded to, P: what the panels hold, W or S's arithmetic.
template <class S, class W, class P, class Cell>
class StreamStack final : public Stream<S> {
  using T = Compute<S>;
  using E = Operand<S>;
  using Params = RecurrentForwardParams<S>;
  using Pass = ForwardPass<S, P, Cell>;

 public:
  explicit StreamStack(const StreamParams<S>& params) : params_(params), packed_(new PackedStack<S, P>) {
    params_.weights = nullptr;  // the caller's, gone after this
    packed_->layers.resize(params.layers);
    const auto take = [&] {
      for (int64_t i = 0; i < params.layers; ++i) {
        packed_->layers[i].template take_weights<Cell>(packed_->workspace, layer(i));
        packed_->layers[i].take_bias(packed_->workspace, layer(i));
      }
    };
    take();
    packed_->workspace.allocate_lasting();
    take();
    take_state();
    for (int64_t i = 0; i < params.layers; ++i) prepare(i, params.weights[i]);
  }

  ~StreamStack() override {
    if (packed_->users.fetch_sub(1) == 1) delete packed_;
  }

  Stream<S>* clone() const override { return new StreamStack(*this); }

  void run(const S* x, S* output, int64_t steps, int max_threads, ParallelFor parallel_for) override {
    const auto plan = plan_for(steps, max_threads);
    Workspace workspace;
    Scratch longer;
    if (steps > 1) {
      longer.take(*this, workspace, plan, steps);
      workspace.allocate();
      longer.take(*this, workspace, plan, steps);
    }
    const Scratch& scratch = steps > 1 ? longer : scratch_;
    const int64_t values = steps * params_.batch;
    std::vector<S> copy;
    if (x < output + values * params_.hidden && output < x + values * params_.input_size) {
      copy.assign(x, x + values * params_.input_size);
      x = copy.data();
    }
    run_team(parallel_for, plan.threads, plan.work_ns, [&](const Team& team) {
      const FlushSubnormals flushing;
      const TileRegisters in_use;
      for (int64_t i = 0; i < params_.layers; ++i) {
        Params p = layer(i);
        p.seq_len = steps;
        p.x = i == 0 ? x : scratch.between[(i - 1) % 2];
        p.output = i + 1 == params_.layers ? output : scratch.between[i % 2];
        auto buffers = layers_[i];
        buffers.x = scratch.x, buffers.gates[0] = scratch.gates[0], buffers.gates[1] = scratch.gates[1];
        Pass(p, plan, buffers, team).run_steps();
        if (i + 1 < params_.layers) team.barrier();
      }
    });
    if (steps % 2)
      for (auto& buffers : layers_) std::swap(buffers.h[0], buffers.h[1]);
  }

  void read_state(S* h, T* c) const override {
    for_rows([&](const E* own_h, const T* own_c, int64_t place) {
      copy_values(own_h, h + place, params_.hidden);
      if (Cell::kHasCellState) copy_values(own_c, c + place, params_.hidden);
    });
  }
  void write_state(const S* h, const T* c) override {
    for_rows([&](E* own_h, T* own_c, int64_t place) {
      copy_values(h + place, own_h, params_.hidden);
      if (Cell::kHasCellState) copy_values(c + place, own_c, params_.hidden);
    });
  }
  void reset(int64_t row) override {
    for (const auto& buffers : layers_) clear(buffers, row);
  }

 private:
  FASTLM_NOINLINE void prepare(int64_t i, const StreamWeights<S>& weights) {
    Params p = layer(i);
    p.b_ih = weights.b_ih, p.b_hh = weights.b_hh;
    TeamState alone(1);
    const int64_t rows = Cell::kGates * p.hidden;
    const Rounded w_ih(weights.w_ih, rows * p.input_size), w_hh(weights.w_hh, rows * p.hidden);
    Pass(p, plan_for(1, 1), layers_[i], Team(&alone, 0, 1)).prepare_weights(w_ih.get(), w_hh.get());
    for (int64_t row = 0; row < params_.batch; ++row) clear(layers_[i], row);
  }

  // What the layers use one after another.
  struct Scratch {
    E* x = nullptr;
    T* gates[2] = {};
    S* between[2] = {};  // (T, B, H): from layer to layer, in turn

    FASTLM_NOINLINE void take(const StreamStack& stack, Workspace& workspace, const RecurrentPlan& plan,
                              int64_t steps) {
      Params widest = stack.layer(0);
      const bool copies = copies_input<E>(widest) || (stack.params_.layers > 1 && copies_input<E>(stack.layer(1)));
      widest.input_size = std::max(widest.input_size, widest.hidden);
      ForwardBuffers<S, P> buffers{};
      buffers.take_scratch(workspace, widest, plan, copies);
      x = buffers.x, gates[0] = buffers.gates[0], gates[1] = buffers.gates[1];
      for (int64_t i = 0; i < std::min<int64_t>(2, stack.params_.layers - 1); ++i)
        between[i] = workspace.take<S>(steps * widest.batch * widest.hidden);
    }
  };

  // Weights in their type here.
  class Rounded {
   public:
    Rounded(const S* weights, int64_t n) : weights_(weights) {
      if constexpr (std::is_same_v<S, W>) return;
      rounded_.resize(n);
      copy_values(weights, rounded_.data(), n);
    }
    const W* get() const {
      if constexpr (std::is_same_v<S, W>)
        return weights_;
      else
        return rounded_.data();
    }

   private:
    const S* weights_;
    std::vector<W> rounded_;
  };

  StreamStack(const StreamStack& other) : Stream<S>(other), params_(other.params_), packed_(other.packed_) {
    packed_->users.fetch_add(1);
    take_state();
    for (size_t i = 0; i < layers_.size(); ++i) {
      std::copy_n(other.layers_[i].h[0], params_.batch * padded<E>(params_.hidden), layers_[i].h[0]);
      std::copy_n(other.layers_[i].c, params_.batch * padded<T>(params_.hidden), layers_[i].c);
    }
  }

  void take_state() {
    layers_ = packed_->layers;
    const auto take = [&] {
      for (int64_t i = 0; i < params_.layers; ++i) layers_[i].take_state(own_, layer(i));
      scratch_.take(*this, own_, plan_for(1, 1 << 10), 1);
    };
    take();
    own_.allocate_lasting();
    take();
  }

  // A layer's sizes.
  Params layer(int64_t i) const {
    Params p{};
    p.seq_len = 1, p.batch = params_.batch, p.hidden = params_.hidden;
    p.input_size = i == 0 ? params_.input_size : params_.hidden;
    return p;
  }
  RecurrentPlan plan_for(int64_t steps, int max_threads) const {
    Params p = layer(0);
    p.seq_len = steps;
    return RecurrentPlan::make_stream(p, Cell::kGates, params_.layers, sizeof(P), max_threads);
  }

  // body(h and c of one row of a layer, where its state lies in (layers, B, H)).
  template <class Body>
  void for_rows(const Body& body) const {
    for (int64_t i = 0; i < params_.layers; ++i)
      for (int64_t row = 0; row < params_.batch; ++row)
        body(layers_[i].h[0] + row * padded<E>(params_.hidden), layers_[i].c + row * padded<T>(params_.hidden),
             (i * params_.batch + row) * params_.hidden);
  }
  void clear(const ForwardBuffers<S, P>& buffers, int64_t row) const {
    const int64_t h_stride = padded<E>(params_.hidden), c_stride = padded<T>(params_.hidden);
    std::fill_n(buffers.h[0] + row * h_stride, h_stride, E{});
    std::fill_n(buffers.c + row * c_stride, c_stride, T(0));
  }

  StreamParams<S> params_;
  PackedStack<S, P>* packed_;
  Workspace own_;
  std::vector<ForwardBuffers<S, P>> layers_;  // packed_'s, with this stream's states; h[0] is the current one
  Scratch scratch_;                           // for one step
};

template <class S, class Cell>
Stream<S>* make_stream(const StreamParams<S>& params) {
  const bool narrow = params.batch <= kNarrowRowsAtMost;
  if constexpr (std::is_same_v<S, float>)
    if (params.bfloat16_weights) {
      if (narrow) return new StreamStack<S, BFloat16, BFloat16, Cell>(params);
      return new StreamStack<S, BFloat16, S, Cell>(params);
    }
  if constexpr (!kPairs<Operand<S>>)
    if (!narrow) return new StreamStack<S, S, Compute<S>, Cell>(params);
  return new StreamStack<S, S, S, Cell>(params);
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
