// The output layer of a language model with its loss (idea of blocks: Wijmans et al. 2024, arXiv:2411.09009).
//
// Rows pass in blocks. Logits of a block lie transposed, [word][row], so that the softmax over words needs no sum
// across a vector and both gradients are products with them as they lie: of weight with rows of them, of hidden with
// columns.
//
// Words are cut into parts, which the members share: the statistics of all parts come first, then every part turns its
// logits, or makes them again where there was no room to keep them, into their gradients and multiplies.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/cross_entropy.h"
#include "cpu/kernels/operands.inl"
#include "cpu/simd/math.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int64_t kLogitsBytes = 32 << 20;  // kept for a block of rows, at most
template <class T>
constexpr int64_t kRowsAtOnce = kDeep<T> / 4;  // of a block: the depth of the product for gradients of weight

template <class S>
class CrossEntropy {
 public:
  using T = Compute<S>;
  using E = Operand<S>;
  using V = Vec<T>;
  static constexpr int64_t kRows = kOperandRows<E>;  // of a tile
  static_assert(kBlockRows % kRows == 0);

  // What follows from the sizes.
  struct Layout {
    int64_t block_rows, row_stride, logit_stride, grad_stride, parts;
    bool keeps_logits, copies_weight;

    static Layout make(const CrossEntropyParams<S>& p, const CrossEntropyPlan& plan) {
      Layout l;
      l.keeps_logits = p.losses && (p.grad_hidden || p.grad_weight || p.grad_bias);
      const int64_t room = l.keeps_logits ? kLogitsBytes / (p.vocab * static_cast<int64_t>(sizeof(T))) : p.rows;
      const int64_t rows = std::max<int64_t>(1, std::min({room, kRowsAtOnce<T>, p.live_rows}));
      l.block_rows = (rows + kCols<T> - 1) / kCols<T> * kCols<T>;
      l.row_stride = FASTLM_ISA_NAMESPACE::row_stride<T>(panels_for<T>(p.dim) * kCols<T>);
      l.logit_stride = FASTLM_ISA_NAMESPACE::row_stride<T>(l.block_rows);
      l.grad_stride = FASTLM_ISA_NAMESPACE::row_stride<E>(l.block_rows);
      l.parts = plan.parts;
      l.copies_weight = !std::is_same_v<S, E> || p.dim % kPairing<E> != 0;
      return l;
    }
  };

  // Of all members, about the block of rows at hand.
  struct Shared {
    E *hidden, *hidden_columns, *hidden_panels;  // rows; panels of rows as columns; panels of columns
    T *logits, *statistics, *target_logits;      // statistics: [part][greatest, sum, total][row]
    T* partial;                                  // [part][row]: gradients of hidden

    static Shared take(Workspace& workspace, const CrossEntropyParams<S>& p, const Layout& l) {
      const int64_t panels = panels_for<T>(p.dim) * kCols<T>;
      Shared s;
      s.hidden = workspace.take<E>(l.block_rows * l.row_stride);
      s.hidden_columns = workspace.take<E>(l.block_rows * panel_depth<E>(p.dim));
      s.hidden_panels = workspace.take<E>(p.grad_weight ? l.block_rows * panels : 0);
      s.logits = workspace.take<T>(l.keeps_logits ? p.vocab * l.logit_stride : 0);
      s.statistics = workspace.take<T>(l.parts * 3 * l.logit_stride);
      s.target_logits = workspace.take<T>(l.block_rows);
      s.partial = workspace.take<T>(p.grad_hidden ? l.parts * l.block_rows * l.row_stride : 0);
      return s;
    }
  };
  // Gradients of weight and bias in the type they are summed in: of `count` items, or the results themselves.
  struct Sums {
    T *weight, *bias;

    static Sums take(Workspace& workspace, const CrossEntropyParams<S>& p, int64_t count) {
      if constexpr (std::is_same_v<S, T>)
        if (count == 1) return {p.grad_weight, p.grad_bias};
      return {workspace.take<T>(p.grad_weight ? count * p.vocab * p.dim : 0),
              workspace.take<T>(p.grad_bias ? count * p.vocab : 0)};
    }
  };

  // Of one member.
  struct Own {
    T *logits, *edge;                 // of a block of words
    E *weight, *panel;                // likewise
    E *grad_rows, *grad_columns;      // gradients of logits as products take them, where that is another type
    T *greatest, *factors, *weights;  // of rows: exp(logit - greatest) times factors is the gradient
    static Own take(Workspace& workspace, const CrossEntropyParams<S>& p, const Layout& l) {
      Own o;
      o.logits = workspace.take<T>(l.keeps_logits ? 0 : kBlockRows * l.logit_stride);
      o.weight = workspace.take<E>(l.copies_weight ? kBlockRows * l.row_stride : 0);
      o.panel = workspace.take<E>(kBlockRows * (kPairs<E> ? panels_for<T>(p.dim) : 1) * kCols<T>);
      o.grad_rows = workspace.take<E>(kPairs<E> ? kBlockRows * l.grad_stride : 0);
      o.grad_columns = workspace.take<E>(kPairs<E> ? kBlockRows * l.grad_stride : 0);
      o.edge = workspace.take<T>(kBlockRows * kCols<T>);
      o.greatest = workspace.take<T>(l.logit_stride);
      o.factors = workspace.take<T>(l.logit_stride);
      o.weights = workspace.take<T>(l.logit_stride);
      return o;
    }
  };

  CrossEntropy(const CrossEntropyParams<S>& p, const Layout& layout, const Shared& shared, const Own& own,
               const Sums& sums, const Team& team)
      : p_(p), layout_(layout), shared_(shared), own_(own), sums_(sums), team_(team) {}

  // Sums are left to be brought into the results.
  void run() {
    const bool gradients = p_.grad_hidden || p_.grad_weight || p_.grad_bias;
    for (first_ = 0; first_ < p_.live_rows; first_ += layout_.block_rows) {
      rows_ = std::min(layout_.block_rows, p_.live_rows - first_);
      gather();
      team_.barrier();
      if (p_.losses) {
        team_.share(layout_.parts, false, [&](int64_t part) { add_statistics(part); });
        team_.barrier();
      }
      take_statistics();
      if (!gradients) continue;
      team_.share(layout_.parts, true, [&](int64_t part) { add_gradients(part); });
      team_.barrier();
      if (p_.grad_hidden) write_grad_hidden();
    }
    if (p_.live_rows == 0) clear_gradients();
  }

 private:
  using Words = Team::Range;

  int64_t row(int64_t r) const { return p_.live[first_ + r]; }
  T row_weight(int64_t r) const { return p_.row_weights ? p_.row_weights[row(r)] : p_.row_weight; }
  T bias(int64_t word) const { return p_.bias ? widen(p_.bias[word]) : T(0); }
  T* statistics(int64_t part, int which) const {
    return shared_.statistics + (part * 3 + which) * layout_.logit_stride;
  }

  // Whole tiles of words, shared evenly.
  static Words words_of(int64_t i, int64_t pieces, Words all) {
    const int64_t tiles = (all.end - all.begin + kRows - 1) / kRows;
    return {std::min(all.end, all.begin + tiles * i / pieces * kRows),
            std::min(all.end, all.begin + tiles * (i + 1) / pieces * kRows)};
  }
  // body(words) for every block of words of a part.
  template <class Body>
  void each_block(int64_t part, const Body& body) const {
    const Words all = words_of(part, layout_.parts, {0, p_.vocab});
    const int64_t blocks = (all.end - all.begin + kBlockRows - 1) / kBlockRows;
    for (int64_t i = 0; i < blocks; ++i) body(words_of(i, blocks, all));
  }

  void clear_gradients() const {
    const auto own = team_.split(p_.vocab);
    if (p_.grad_weight) std::fill(sums_.weight + own.begin * p_.dim, sums_.weight + own.end * p_.dim, T(0));
    if (p_.grad_bias) std::fill(sums_.bias + own.begin, sums_.bias + own.end, T(0));
  }

  // The block's rows of hidden in the forms that the products take.
  void gather() const {
    const auto own = team_.split(rows_, kCols<T>);
    for (int64_t r = own.begin; r < own.end; ++r)
      copy_rows(p_.hidden + row(r) * p_.dim, 0, 1, p_.dim, shared_.hidden + r * layout_.row_stride, 0);
    for (int64_t r = own.begin; r < own.end; r += kCols<T>)
      pack_transposed(shared_.hidden + r * layout_.row_stride, layout_.row_stride, p_.dim,
                      std::min(kCols<T>, own.end - r), shared_.hidden_columns + r * panel_depth<E>(p_.dim));
    if (!p_.grad_weight) return;
    for (int64_t d = 0; d < p_.dim; d += kCols<T>)
      pack_columns(shared_.hidden + own.begin * layout_.row_stride + d, layout_.row_stride, own.end - own.begin,
                   p_.dim - d, shared_.hidden_panels + d * layout_.block_rows + own.begin * kCols<T>);
  }
  // A panel of up to kCols columns of these rows.
  template <class From>
  static void pack_columns(const From* from, int64_t stride, int64_t rows, int64_t width, E* panel) {
    if constexpr (kPairs<E>)
      pack_panel(from, stride, rows, std::min(kCols<T>, width), panel, kCols<T>);
    else
      pack_rows(from, stride, rows, std::min(kCols<T>, width), panel);
  }

  struct Rows {
    const E* data;
    int64_t stride;
  };
  Rows weight(Words words) const {
    const S* from = p_.weight + words.begin * p_.dim;
    if constexpr (std::is_same_v<S, E>)
      if (!layout_.copies_weight) return {from, p_.dim};
    copy_rows(from, p_.dim, words.end - words.begin, p_.dim, own_.weight, layout_.row_stride);
    return {own_.weight, layout_.row_stride};
  }

  // The rows of weight for the products after the one at hand, as far as they are new to it.
  Ahead weight_ahead(Words words) const {
    const S* from = p_.weight + words.begin * p_.dim;
    return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(p_.weight + words.end * p_.dim)};
  }

  // Without bias, which whoever reads them adds.
  T* make_logits(Words words) const {
    const auto [weight, stride] = this->weight(words);
    T* logits = layout_.keeps_logits ? shared_.logits + words.begin * layout_.logit_stride : own_.logits;
    Ahead ahead = weight_ahead({words.end, std::min(p_.vocab, 2 * words.end - words.begin)});
    for (int64_t r = 0; r < rows_; r += kCols<T>) {
      const E* panel = shared_.hidden_columns + r * panel_depth<E>(p_.dim);
      rows_times_panel<E, E, T>(weight, stride, words.end - words.begin, panel, std::min(kCols<T>, rows_ - r), p_.dim,
                                logits + r, layout_.logit_stride, Init::kZero, nullptr, 1, panel + kCols<T> * p_.dim,
                                &ahead);
    }
    return logits;
  }

  void add_statistics(int64_t part) const {
    T *greatest = statistics(part, 0), *sums = statistics(part, 1), *totals = statistics(part, 2);
    std::fill_n(greatest, layout_.logit_stride, std::numeric_limits<T>::lowest());
    std::fill_n(sums, layout_.logit_stride, T(0));
    std::fill_n(totals, layout_.logit_stride, T(0));
    int64_t before = 0;
    each_block(part, [&](Words words) {
      const T* logits = make_logits(words);
      for (int64_t r = 0; r < rows_; r += V::kLanes)
        add_statistics(words, logits + r, before, greatest + r, sums + r, totals + r);
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t word = p_.target[row(r)];
        if (words.begin <= word && word < words.end)
          shared_.target_logits[r] = logits[(word - words.begin) * layout_.logit_stride + r] + bias(word);
      }
      before += words.end - words.begin;
    });
  }

  // Takes a block of words into the statistics of some rows, which `before` words of the part are in.
  void add_statistics(Words words, const T* logits, int64_t before, T* greatest, T* sums, T* totals) const {
    const V log2e = V::broadcast(ExpConstants<T>::kLog2e);
    const auto each = [&](const auto& body) FASTLM_LAMBDA_INLINE {
      const T* at = logits;
      for (int64_t word = words.begin; word < words.end; ++word, at += layout_.logit_stride)
        body(p_.bias ? V::load(at) + V::broadcast(bias(word)) : V::load(at));
    };
    const V old = V::load(greatest);
    V most = old;
    each([&](const V& logit) FASTLM_LAMBDA_INLINE { most = at_least(most, logit); });
    most.store(greatest);
    V sum = V::load(sums) * exp2_nonpositive((old - most) * log2e);
    each([&](const V& logit) FASTLM_LAMBDA_INLINE { sum = sum + exp2_nonpositive((logit - most) * log2e); });
    sum.store(sums);
    if (p_.smoothing == T(0)) return;
    V total = V::load(totals);
    if (before > 0) total = fma(V::broadcast(static_cast<T>(before)), old - most, total);
    each([&](const V& logit) FASTLM_LAMBDA_INLINE { total = total + (logit - most); });
    total.store(totals);
  }

  // What every member must know of the rows before gradients; forward writes it, and the losses, once.
  void take_statistics() const {
    if (p_.losses)
      merge_statistics();
    else
      for (int64_t r = 0; r < rows_; ++r)
        own_.greatest[r] = p_.statistics[row(r)], own_.factors[r] = p_.statistics[p_.rows + row(r)];
    const auto own = team_.split(rows_);
    for (int64_t r = own.begin; p_.losses && r < own.end; ++r) {
      p_.statistics[row(r)] = own_.greatest[r], p_.statistics[p_.rows + row(r)] = own_.factors[r];
      p_.losses[row(r)] = loss(r);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      own_.weights[r] = row_weight(r);
      own_.factors[r] = own_.weights[r] / own_.factors[r];
    }
    for (int64_t r = rows_; r < lanes_up<T>(rows_); ++r) {  // of a vector's end: rows whose gradients are 0
      own_.greatest[r] = std::numeric_limits<T>::infinity();
      own_.weights[r] = own_.factors[r] = T(0);
    }
  }
  void merge_statistics() const {
    const V log2e = V::broadcast(ExpConstants<T>::kLog2e);
    for (int64_t r = 0; r < rows_; r += V::kLanes) {
      V most = V::load(statistics(0, 0) + r), sum = V::zero();
      for (int64_t part = 1; part < layout_.parts; ++part) most = at_least(most, V::load(statistics(part, 0) + r));
      for (int64_t part = 0; part < layout_.parts; ++part) {
        const V below = V::load(statistics(part, 0) + r) - most;
        sum = fma(V::load(statistics(part, 1) + r), exp2_nonpositive(below * log2e), sum);
      }
      most.store(own_.greatest + r), sum.store(own_.factors + r);
    }
  }
  T loss(int64_t r) const {
    const T log_sum = std::log(own_.factors[r]), most = own_.greatest[r];
    const T loss = log_sum - (1 - p_.smoothing) * (shared_.target_logits[r] - most);
    if (p_.smoothing == T(0)) return loss;
    T total = 0;  // of all logits, above the greatest
    for (int64_t part = 0; part < layout_.parts; ++part) {
      const Words words = words_of(part, layout_.parts, {0, p_.vocab});
      total += statistics(part, 2)[r] + (words.end - words.begin) * (statistics(part, 0)[r] - most);
    }
    return loss - p_.smoothing / p_.vocab * total;
  }

  void add_gradients(int64_t part) const {
    bool first = true;
    each_block(part, [&](Words words) {
      T* logits = layout_.keeps_logits ? shared_.logits + words.begin * layout_.logit_stride : make_logits(words);
      differentiate(words, logits);
      if (p_.grad_bias) add_grad_bias(words, logits);
      if constexpr (kPairs<E>) round_gradients(words, logits);
      if (p_.grad_weight) add_grad_weight(words, logits);
      if (p_.grad_hidden) add_grad_hidden(words, logits, part, first);
      first = false;
    });
    if (first && p_.grad_hidden)  // a part of no words
      std::fill_n(shared_.partial + part * layout_.block_rows * layout_.row_stride, rows_ * layout_.row_stride, T(0));
  }

  // Logits become the gradients of theirs.
  void differentiate(Words words, T* logits) const {
    const V log2e = V::broadcast(ExpConstants<T>::kLog2e), uniform = V::broadcast(p_.smoothing / p_.vocab);
    T* at = logits;
    for (int64_t word = words.begin; word < words.end; ++word, at += layout_.logit_stride) {
      const V shift = V::broadcast(bias(word));
      for (int64_t r = 0; r < rows_; r += V::kLanes) {
        const V logit = p_.bias ? V::load(at + r) + shift : V::load(at + r);
        V grad = exp2_nonpositive((logit - V::load(own_.greatest + r)) * log2e) * V::load(own_.factors + r);
        if (p_.smoothing != T(0)) grad = fnma(uniform, V::load(own_.weights + r), grad);
        grad.store(at + r);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t word = p_.target[row(r)];
      if (words.begin <= word && word < words.end)
        logits[(word - words.begin) * layout_.logit_stride + r] -= own_.weights[r] * (1 - p_.smoothing);
    }
  }

  void add_grad_bias(Words words, const T* grads) const {
    for (int64_t word = words.begin; word < words.end; ++word, grads += layout_.logit_stride) {
      V sums = V::zero();
      for (int64_t r = 0; r < rows_; r += V::kLanes) sums = sums + V::load_partial(grads + r, rows_ - r);
      const T sum = total(sums);
      sums_.bias[word] = first_ > 0 ? sums_.bias[word] + sum : sum;
    }
  }

  // In rows of words and in columns of rows, words in pairs.
  void round_gradients(Words words, const T* grads) const {
    const int64_t count = words.end - words.begin;
    for (int64_t i = 0; i < count; i += 2, grads += 2 * layout_.logit_stride) {
      E *row = own_.grad_rows + i * layout_.grad_stride, *column = own_.grad_columns + i * layout_.grad_stride;
      for (int64_t r = 0; r < rows_; r += V::kLanes) {
        const V first = V::load(grads + r),
                second = i + 1 < count ? V::load(grads + layout_.logit_stride + r) : V::zero();
        store_operand(first, row + r);
        store_operand(second, row + layout_.grad_stride + r);
        const FloatBits words = pair_lanes(operand_bits(first), operand_bits(second));
        memcpy(column + 2 * r, &words, sizeof(words));
      }
    }
  }

  void add_grad_weight(Words words, const T* grads) const {
    const auto [from, stride] = operand_rows(grads);
    const int64_t count = words.end - words.begin;
    const Init init = first_ > 0 ? Init::kAccumulate : Init::kZero;
    Ahead ahead = weight_ahead(p_.grad_hidden ? words : Words{});
    for (int64_t d = 0; d < p_.dim; d += kCols<T>) {
      const E* panel = shared_.hidden_panels + d * layout_.block_rows;
      const E* next = panel + layout_.block_rows * kCols<T>;
      T* to = sums_.weight + words.begin * p_.dim + d;
      const int64_t cols = std::min(kCols<T>, p_.dim - d);
      const bool whole = cols == kCols<T>;
      rows_times_panel<E, E, T>(from, stride, count, panel, cols, rows_, whole ? to : own_.edge,
                                whole ? p_.dim : kCols<T>, whole ? init : Init::kZero, nullptr, 1, next, &ahead);
      for (int64_t i = 0; !whole && i < count; ++i)
        for (int64_t j = 0; j < cols; ++j)
          to[i * p_.dim + j] = own_.edge[i * kCols<T> + j] + (first_ > 0 ? to[i * p_.dim + j] : T(0));
    }
  }

  Rows operand_rows(const T* grads) const {
    if constexpr (kPairs<E>)
      return {own_.grad_rows, layout_.grad_stride};
    else
      return {grads, layout_.logit_stride};
  }

  void add_grad_hidden(Words words, const T* grads, int64_t part, bool first) const {
    T* sums = shared_.partial + part * layout_.block_rows * layout_.row_stride;
    for (int64_t d = 0; d < p_.dim; d += kCols<T>) {
      const int64_t count = words.end - words.begin;
      E* panel = own_.panel + (kPairs<E> ? d * kBlockRows : 0);
      pack_columns(p_.weight + words.begin * p_.dim + d, p_.dim, count, p_.dim - d, panel);
      if constexpr (!kPairs<E>)
        each_tile([&](int64_t begin, int64_t end) {
          run_tile_of<true>(static_cast<int>(end - begin), std::min(kCols<T>, p_.dim - d), 1,
                            TileParams<T>{grads + begin, layout_.logit_stride, panel, kCols<T>, count,
                                          sums + begin * layout_.row_stride + d, layout_.row_stride,
                                          first ? Init::kZero : Init::kAccumulate, nullptr, panel});
        });
    }
    if constexpr (kPairs<E>)  // with all panels at once: columns of A may have to be brought into rows
      each_tile([&](int64_t begin, int64_t end) {
        multiply<true>(end - begin, words.end - words.begin, p_.dim,
                       PanelProduct<E>{own_.grad_columns + 2 * begin, 2 * layout_.grad_stride, own_.panel, 2 * kCols<T>,
                                       kBlockRows * kCols<T>, sums + begin * layout_.row_stride, layout_.row_stride},
                       !first);
      });
  }
  // body(begin, end) for every tile of the block's rows.
  template <class Body>
  void each_tile(const Body& body) const {
    const int64_t tiles = (rows_ + kRows - 1) / kRows;
    for (int64_t i = 0; i < tiles; ++i) body(rows_ * i / tiles, rows_ * (i + 1) / tiles);
  }

  void write_grad_hidden() const {
    const auto own = team_.split(rows_);
    const int64_t step = layout_.block_rows * layout_.row_stride;
    for (int64_t r = own.begin; r < own.end; ++r) {
      const T* from = shared_.partial + r * layout_.row_stride;
      S* to = p_.grad_hidden + row(r) * p_.dim;
      for (int64_t d = 0; d < p_.dim; d += V::kLanes) {
        V sum = V::load(from + d);
        for (int64_t part = 1; part < layout_.parts; ++part) sum = sum + V::load(from + part * step + d);
        store_as(sum, to + d, p_.dim - d);
      }
    }
  }

  const CrossEntropyParams<S>& p_;
  const Layout& layout_;
  const Shared shared_;
  const Own own_;
  const Sums sums_;
  const Team& team_;
  int64_t first_ = 0, rows_ = 0;  // of the block at hand, counted in live rows
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
