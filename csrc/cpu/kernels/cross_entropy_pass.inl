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
#ifdef FASTLM_FLOATS_ELSEWHERE
#include "cpu/kernels/split_gemm.inl"
#endif
#include "cpu/simd/math.h"
#include "cpu/sum_tree.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int64_t kLogitsBytes = 40 << 20;  // kept for a block of rows, at most
// Of a block: the depth of the product for gradients of weight. Pairs pass it in half the time, by tile registers too
// soon to matter.
template <class E>
constexpr int64_t kRowsAtOnce = kDeep<Compute<E>> / (kPairs<E> && kOperandRows<E> == kTileRows ? 2 : 4);
constexpr int64_t kBytesInPlace = 256 << 10;  // what stays in cache; all else would be written to memory again
constexpr int64_t kBytesAhead = 512 << 10;    // that L2 has room for beside the operands at work

template <class S>
class CrossEntropy {
 public:
  using T = Compute<S>;
  using E = Operand<S>;
  using Gathered = std::conditional_t<kSplit<E>, T, E>;  // rows of hidden, before they are packed
  using V = Vec<T>;
  static constexpr int64_t kRows = kOperandRows<E>;  // of a tile
  // Words of a block, the depth of the product for gradients of hidden: more leave other operands no room in L2, but a
  // part is not cut for a few.
  static constexpr int64_t kWords = kBlockRows, kWordsAtMost = 128 / kRows * kRows;
  static_assert(kWords % kRows == 0);

  // Gradients of weight pass through memory once a block. Of so few rows that fit, logits are sooner made again than
  // kept, the more so where products cost little.
  static constexpr bool kCheap = kRows > kTileRows;
  static constexpr int64_t kLeastKept = kRowsAtOnce<E> / (kCheap ? 1 : 2);
  static constexpr int64_t kMostBytes = kLogitsBytes * (kCheap ? 1 : 2);  // for the least
  static int64_t rows_in(int64_t bytes, int64_t vocab) {
    return bytes / (vocab * int64_t{sizeof(T)}) / kCols<T> * kCols<T>;
  }

  static bool has_gradients(const CrossEntropyParams<S>& p) { return p.grad_hidden || p.grad_weight || p.grad_bias; }

  // What follows from the sizes.
  struct Layout {
    int64_t block_rows, row_stride, weight_stride, logit_stride, grad_stride, rounded_stride, parts;
    bool keeps_logits, in_place, copies_weight;  // in_place: logits become their gradients where they lie
    bool few_words;                              // whose logits stay in cache
    bool fetches_sums;                           // of gradients of weight, of a block of words, before its product

    static Layout make(const CrossEntropyParams<S>& p, const CrossEntropyPlan& plan) {
      Layout l;
      const int64_t wanted = std::max<int64_t>(1, std::min(kRowsAtOnce<E>, p.live_rows));
      const int64_t kept = std::max(rows_in(kLogitsBytes, p.vocab), std::min(rows_in(kMostBytes, p.vocab), kLeastKept));
      l.keeps_logits = p.losses && has_gradients(p) && kept >= std::min(wanted, kLeastKept);
      l.block_rows = (wanted + kCols<T> - 1) / kCols<T> * kCols<T>;
      if (l.keeps_logits) l.block_rows = std::min(l.block_rows, kept);
      l.row_stride = FASTLM_ISA_NAMESPACE::row_stride<T>(panels_for<T>(p.dim) * kCols<T>);
      l.weight_stride = kSplit<E> ? FASTLM_ISA_NAMESPACE::row_stride<E>(p.dim) : l.row_stride;
      l.grad_stride = FASTLM_ISA_NAMESPACE::row_stride<T>(l.block_rows);
      l.few_words = p.vocab * l.grad_stride * int64_t{sizeof(T)} <= kBytesInPlace;
      l.in_place = !l.keeps_logits || l.few_words;
      // Padding costs memory, and is needed where few sets of the cache would hold all words.
      const bool dense = !l.in_place && l.block_rows * sizeof(T) % 512 != 0;
      l.logit_stride = dense ? l.block_rows : l.grad_stride;
      l.rounded_stride = FASTLM_ISA_NAMESPACE::row_stride<E>(l.block_rows);
      l.fetches_sums = p.grad_weight && kWords * p.dim * int64_t{sizeof(T)} <= kBytesAhead;
      l.parts = plan.parts;
      l.copies_weight = !std::is_same_v<S, E> || p.dim % kPairing<E> != 0;
      return l;
    }
  };

  // Of all members, about the block of rows at hand.
  struct Shared {
    Gathered* hidden;                        // rows, if copied
    E *hidden_columns, *hidden_panels;       // panels of rows as columns; panels of columns
    T *logits, *statistics, *target_logits;  // statistics: [part][greatest, sum, total][row]
    T* slabs;                                // gradients of hidden, which meet in the tree
    SumTree* tree;                           // of more parts than one

    static Shared take(Workspace& workspace, const CrossEntropyParams<S>& p, const Layout& l) {
      const int64_t panels = panels_for<T>(p.dim) * kCols<T>;
      Shared s;
      s.hidden = workspace.take<Gathered>(l.block_rows * l.row_stride);
      s.hidden_columns = workspace.take<E>(l.block_rows * panel_depth<E>(p.dim));
      s.hidden_panels = workspace.take<E>(p.grad_weight ? l.block_rows * panels : 0);
      s.logits = workspace.take<T>(l.keeps_logits ? p.vocab * l.logit_stride : 0);
      s.statistics = workspace.take<T>(l.parts * 3 * l.block_rows);
      s.target_logits = workspace.take<T>(l.block_rows);
      return s;
    }
    // Last of all: those that are never touched cost no memory, but for what shares a page with them.
    void take_slabs(Workspace& workspace, const CrossEntropyParams<S>& p, const Layout& l, SumTree* to_meet_in) {
      slabs = workspace.take<T>(p.grad_hidden ? l.parts * l.block_rows * l.row_stride : 0);
      tree = l.parts > 1 ? to_meet_in : nullptr;
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
    T *block, *edge;                    // of a block of words: logits that are not kept, and gradients of logits
    E *weight, *panel;                  // likewise
    E *rounded_rows, *rounded_columns;  // gradients of logits as products take them, where that is another type
    E* turned;                          // a tile's columns of them, as rows
    T *greatest, *factors, *weights;    // of rows: exp(logit - greatest) times factors is the gradient
    static Own take(Workspace& workspace, const CrossEntropyParams<S>& p, const Layout& l) {
      Own o;
      o.block = workspace.take<T>(l.keeps_logits && l.in_place ? 0 : kWordsAtMost * l.grad_stride);
      o.weight = workspace.take<E>(l.copies_weight ? kWordsAtMost * l.weight_stride : 0);
      o.panel = workspace.take<E>(kWordsAtMost * (kApart<E> ? panels_for<T>(p.dim) : 1) * kCols<T>);
      o.rounded_rows = workspace.take<E>(kApart<E> ? kWordsAtMost * l.rounded_stride : 0);
      o.rounded_columns = workspace.take<E>(kPairs<E> ? kWordsAtMost * l.rounded_stride : 0);
      o.turned = workspace.take<E>(kSplit<E> ? kRows * row_stride<E>(kWordsAtMost) : 0);
      o.edge = workspace.take<T>(kWordsAtMost * kCols<T>);
      o.greatest = workspace.take<T>(l.block_rows);
      o.factors = workspace.take<T>(l.block_rows);
      o.weights = workspace.take<T>(l.block_rows);
      return o;
    }
  };

  CrossEntropy(const CrossEntropyParams<S>& p, const Layout& layout, const Shared& shared, const Own& own,
               const Sums& sums, const Team& team)
      : p_(p), layout_(layout), shared_(shared), own_(own), sums_(sums), team_(team) {}

  // Sums are left to be brought into the results.
  void run() {
    for (first_ = 0; first_ < p_.live_rows; first_ += layout_.block_rows) {
      rows_ = std::min(layout_.block_rows, p_.live_rows - first_);
      gather();
      team_.barrier();
      if (p_.losses) {
        team_.share(layout_.parts, false, [&](int64_t part) { add_statistics(part); });
        team_.barrier();
      }
      take_statistics();
      if (!has_gradients(p_)) continue;
      team_.share(layout_.parts, true, [&](int64_t part) { add_gradients(part); });
      team_.barrier();
      if (p_.grad_hidden && !sums_into_result()) write_grad_hidden();
    }
    if (p_.live_rows == 0) clear_gradients();
  }

 private:
  using Words = Team::Range;
  template <class X>
  struct Rows {
    const X* data;
    int64_t stride;
  };

  int64_t row(int64_t r) const { return p_.live[first_ + r]; }
  T row_weight(int64_t r) const { return p_.row_weights ? p_.row_weights[row(r)] : p_.row_weight; }
  T bias(int64_t word) const { return p_.bias ? widen(p_.bias[word]) : T(0); }
  T* statistics(int64_t part, int which) const { return shared_.statistics + (part * 3 + which) * layout_.block_rows; }

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
    const int64_t count = all.end - all.begin, blocks = count <= kWordsAtMost ? 1 : (count + kWords - 1) / kWords;
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
    const auto [rows, stride] = hidden_rows(own);
    for (int64_t r = own.begin; r < own.end; r += kCols<T>)
      pack_transposed(rows + r * stride, stride, p_.dim, std::min(kCols<T>, own.end - r),
                      shared_.hidden_columns + r * panel_depth<E>(p_.dim));
    if (!p_.grad_weight) return;
    for (int64_t d = 0; d < p_.dim; d += kCols<T>)
      pack_columns(rows + own.begin * stride + d, stride, own.end - own.begin, p_.dim - d,
                   shared_.hidden_panels + d * layout_.block_rows, own.begin, layout_.block_rows);
  }
  // Copied only where they lie apart, are of another type or end in half a pair.
  Rows<Gathered> hidden_rows(Team::Range own) const {
    if constexpr (std::is_same_v<S, Gathered>)
      if (consecutive() && p_.dim % kPairing<E> == 0) return {p_.hidden + row(0) * p_.dim, p_.dim};
    for (int64_t r = own.begin; r < own.end; ++r)
      copy_rows(p_.hidden + row(r) * p_.dim, 0, 1, p_.dim, shared_.hidden + r * layout_.row_stride, 0);
    return {shared_.hidden, layout_.row_stride};
  }
  bool consecutive() const { return row(rows_ - 1) - row(0) == rows_ - 1; }
  // Of a panel of up to kCols columns and `depth` rows, those from `first` on.
  template <class From>
  static void pack_columns(const From* from, int64_t stride, int64_t rows, int64_t width, E* panel, int64_t first,
                           int64_t depth) {
    const int64_t cols = std::min(kCols<T>, width);
    if constexpr (kSplit<E>)
      pack_part(from, stride, rows, cols, panel + first * kPairColumns, kCols<T>, pair_step(depth));
    else if constexpr (kPairs<E>)
      pack_panel(from, stride, rows, cols, panel + first * kCols<T>, kCols<T>);
    else
      pack_rows(from, stride, rows, cols, panel + first * kCols<T>);
  }

  Rows<E> weight(Words words) const {
    const S* from = p_.weight + words.begin * p_.dim;
    if constexpr (std::is_same_v<S, E>)
      if (!layout_.copies_weight) return {from, p_.dim};
    copy_rows(from, p_.dim, words.end - words.begin, p_.dim, own_.weight, layout_.weight_stride);
    return {own_.weight, layout_.weight_stride};
  }

  // Rows of weight, or of its gradient, for the products after the one at hand.
  template <class X>
  Ahead rows_ahead(const X* rows, Words words) const {
    return {reinterpret_cast<const char*>(rows + words.begin * p_.dim),
            reinterpret_cast<const char*>(rows + words.end * p_.dim)};
  }
  // Of the rows of hidden after this block, the part that is these words' to fetch.
  Ahead hidden_ahead(Words words) const {
    const int64_t next = row(rows_ - 1) + 1, rows = std::min(rows_, p_.rows - next);
    return rows_ahead(p_.hidden, {next + rows * words.begin / p_.vocab, next + rows * words.end / p_.vocab});
  }
  Words after(Words words) const { return {words.end, std::min(p_.vocab, 2 * words.end - words.begin)}; }

  T* kept_logits(Words words) const { return shared_.logits + words.begin * layout_.logit_stride; }

  // Without bias, which whoever reads them adds.
  T* make_logits(Words words) const {
    const auto [weight, stride] = this->weight(words);
    T* logits = layout_.keeps_logits ? kept_logits(words) : own_.block;
    Ahead ahead = rows_ahead(p_.weight, after(words));
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
    std::fill_n(greatest, layout_.block_rows, std::numeric_limits<T>::lowest());
    std::fill_n(sums, layout_.block_rows, T(0));
    std::fill_n(totals, layout_.block_rows, T(0));
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
    const bool direct = sums_into_result();
    const int sum = p_.grad_hidden && shared_.tree ? shared_.tree->take() : 0;
    const Sum grad_hidden = direct ? Sum{result_rows(), p_.dim} : Sum{slab(sum), layout_.row_stride};
    bool first = true;
    each_block(part, [&](Words words) {
      T* logits = layout_.keeps_logits ? kept_logits(words) : make_logits(words);
      T* grads = layout_.in_place ? logits : own_.block;
      differentiate(words, logits, grads);
      if (p_.grad_bias) add_grad_bias(words, grads);
      if constexpr (kPairs<E>) round_gradients(words, grads);
      if constexpr (kSplit<E>)
        copy_rows(grads, layout_.grad_stride, words.end - words.begin, rows_, own_.rounded_rows,
                  layout_.rounded_stride);
      if (p_.grad_hidden) add_grad_hidden(words, grads, grad_hidden, first);
      if (p_.grad_weight) add_grad_weight(words, grads);
      first = false;
    });
    if (!p_.grad_hidden || direct) return;
    if (first) std::fill_n(slab(sum), rows_ * layout_.row_stride, T(0));  // a part of no words
    if (shared_.tree)
      shared_.tree->give(static_cast<int>(part), sum, [&](int to, int from) { add_rows(slab(to), slab(from)); });
  }

  // Gradients of hidden: where there is one part of them, they are summed where they are wanted.
  struct Sum {
    T* data;
    int64_t stride;
  };
  bool sums_into_result() const {
    return std::is_same_v<S, T> && p_.grad_hidden && layout_.parts == 1 && p_.dim % V::kLanes == 0 && consecutive();
  }
  T* result_rows() const { return reinterpret_cast<T*>(p_.grad_hidden + row(0) * p_.dim); }

  T* slab(int i) const { return shared_.slabs + i * layout_.block_rows * layout_.row_stride; }
  void add_rows(T* to, const T* from) const {
    for (int64_t i = 0; i < rows_ * layout_.row_stride; i += V::kLanes)
      (V::load(to + i) + V::load(from + i)).store(to + i);
  }

  // Gradients of logits, which may lie where these do.
  void differentiate(Words words, const T* logits, T* grads) const {
    const V log2e = V::broadcast(ExpConstants<T>::kLog2e), uniform = V::broadcast(p_.smoothing / p_.vocab);
    T* at = grads;
    for (int64_t word = words.begin; word < words.end;
         ++word, logits += layout_.logit_stride, at += layout_.grad_stride) {
      const V shift = V::broadcast(bias(word));
      for (int64_t r = 0; r < rows_; r += V::kLanes) {
        const V logit = p_.bias ? V::load(logits + r) + shift : V::load(logits + r);
        V grad = exp2_nonpositive((logit - V::load(own_.greatest + r)) * log2e) * V::load(own_.factors + r);
        if (p_.smoothing != T(0)) grad = fnma(uniform, V::load(own_.weights + r), grad);
        grad.store(at + r);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t word = p_.target[row(r)];
      if (words.begin <= word && word < words.end)
        grads[(word - words.begin) * layout_.grad_stride + r] -= own_.weights[r] * (1 - p_.smoothing);
    }
  }

  void add_grad_bias(Words words, const T* grads) const {
    for (int64_t word = words.begin; word < words.end; ++word, grads += layout_.grad_stride) {
      V sums = V::zero();
      for (int64_t r = 0; r < rows_; r += V::kLanes) sums = sums + V::load_partial(grads + r, rows_ - r);
      const T sum = total(sums);
      sums_.bias[word] = first_ > 0 ? sums_.bias[word] + sum : sum;
    }
  }

  // In rows of words and in columns of rows, words in pairs.
  void round_gradients(Words words, const T* grads) const {
    const int64_t count = words.end - words.begin;
    for (int64_t i = 0; i < count; i += 2, grads += 2 * layout_.grad_stride) {
      E *row = own_.rounded_rows + i * layout_.rounded_stride,
        *column = own_.rounded_columns + i * layout_.rounded_stride;
      for (int64_t r = 0; r < rows_; r += V::kLanes) {
        const V first = V::load(grads + r),
                second = i + 1 < count ? V::load(grads + layout_.grad_stride + r) : V::zero();
        store_operand(first, row + r);
        store_operand(second, row + layout_.rounded_stride + r);
        const FloatBits words = pair_lanes(operand_bits(first), operand_bits(second));
        memcpy(column + 2 * r, &words, sizeof(words));
      }
    }
  }

  void add_grad_weight(Words words, const T* grads) const {
    const auto [from, stride] = operand_rows(grads);
    const int64_t count = words.end - words.begin;
    const Init init = first_ > 0 ? Init::kAccumulate : Init::kZero;
    Ahead ahead = rows_ahead(p_.weight, p_.grad_hidden ? after(words) : Words{});
    for (int64_t d = 0; d < p_.dim; d += kCols<T>) {
      const E* panel = shared_.hidden_panels + d * layout_.block_rows;
      const E* next = panel + layout_.block_rows * kCols<T>;
      T* to = sums_.weight + words.begin * p_.dim + d;
      const int64_t cols = std::min(kCols<T>, p_.dim - d);
      const bool whole = cols == kCols<T>;
      if constexpr (kSplit<E>)
        split_rows_times_panel(from, stride, count, panel, pair_step(layout_.block_rows), cols, rows_,
                               whole ? to : own_.edge, whole ? p_.dim : kCols<T>, whole ? init : Init::kZero, nullptr);
      else
        rows_times_panel<E, E, T>(from, stride, count, panel, cols, rows_, whole ? to : own_.edge,
                                  whole ? p_.dim : kCols<T>, whole ? init : Init::kZero, nullptr, 1, next, &ahead);
      for (int64_t i = 0; !whole && i < count; ++i)
        for (int64_t j = 0; j < cols; ++j)
          to[i * p_.dim + j] = own_.edge[i * kCols<T> + j] + (first_ > 0 ? to[i * p_.dim + j] : T(0));
    }
  }

  Rows<E> operand_rows(const T* grads) const {
    if constexpr (kApart<E>)
      return {own_.rounded_rows, layout_.rounded_stride};
    else
      return {grads, layout_.grad_stride};
  }

  void add_grad_hidden(Words words, const T* grads, Sum sum, bool first) const {
    Ahead ahead{};
    if (layout_.few_words)
      ahead = hidden_ahead(words);
    else if (layout_.fetches_sums)
      ahead = rows_ahead(sums_.weight, words);
    for (int64_t d = 0; d < p_.dim; d += kCols<T>) {
      const int64_t count = words.end - words.begin;
      E* panel = own_.panel + (kApart<E> ? d * kWordsAtMost : 0);
      pack_columns(p_.weight + words.begin * p_.dim + d, p_.dim, count, p_.dim - d, panel, 0, count);
      if constexpr (!kApart<E>)
        each_tile([&](int64_t begin, int64_t end) {
          run_tile_of<true>(
              static_cast<int>(end - begin), std::min(kCols<T>, p_.dim - d), 1,
              TileParams<T>{grads + begin, layout_.grad_stride, panel, kCols<T>, count,
                            sum.data + begin * sum.stride + d, sum.stride, first ? Init::kZero : Init::kAccumulate,
                            nullptr, ahead.take(count / 2 * kFetched<T>, static_cast<const T*>(panel))});
        });
    }
    if constexpr (kPairs<E>)  // with all panels at once: columns of A may have to be brought into rows
      each_tile([&](int64_t begin, int64_t end) {
        multiply<true>(
            end - begin, words.end - words.begin, p_.dim,
            PanelProduct<E>{own_.rounded_columns + 2 * begin, 2 * layout_.rounded_stride, own_.panel, 2 * kCols<T>,
                            kWordsAtMost * kCols<T>, sum.data + begin * sum.stride, sum.stride},
            !first);
      });
    if constexpr (kSplit<E>)
      each_tile([&](int64_t begin, int64_t end) { add_tile(words, grads, sum, first, begin, end); });
  }
  // Columns [begin, end) of gradients of logits, as rows, times the panels of a block of words.
  void add_tile(Words words, const T* grads, Sum sum, bool first, int64_t begin, int64_t end) const {
    const int64_t count = words.end - words.begin, stride = row_stride<E>(count);
    split_columns(grads + begin, layout_.grad_stride, count, end - begin, own_.turned, stride);
    for (int64_t d = 0; d < p_.dim; d += kCols<T>)
      split_rows_times_panel(own_.turned, stride, end - begin, own_.panel + d * kWordsAtMost, pair_step(count),
                             std::min(kCols<T>, p_.dim - d), count, sum.data + begin * sum.stride + d, sum.stride,
                             first ? Init::kZero : Init::kAccumulate, nullptr);
  }
  // body(begin, end) for every tile of the block's rows.
  template <class Body>
  void each_tile(const Body& body) const {
    const int64_t tiles = (rows_ + kRows - 1) / kRows;
    for (int64_t i = 0; i < tiles; ++i) body(rows_ * i / tiles, rows_ * (i + 1) / tiles);
  }

  void write_grad_hidden() const {
    const auto own = team_.split(rows_);
    const T* from = slab(shared_.tree ? shared_.tree->total() : 0);
    for (int64_t r = own.begin; r < own.end; ++r)
      for (int64_t d = 0; d < p_.dim; d += V::kLanes)
        store_as(V::load(from + r * layout_.row_stride + d), p_.grad_hidden + row(r) * p_.dim + d, p_.dim - d);
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
