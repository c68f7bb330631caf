// Attention forward: flash tiles (Dao et al. 2022, arXiv:2205.14135) with the online softmax; nothing of Tq x Tk
// stored.
//
// An item is a range of queries of all query heads that share keys. It takes in the keys a chunk after another: packs
// what of it some query sees, then for each tile of some queries makes the products with the keys, their
// exponentials, and adds the products with the values to sums that stay in L2. Where weights are wanted a chunk is all
// keys, so that they are known as soon as a row's exponentials are.
#pragma once

#include "cpu/kernels/attention_scores.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Whose keys and values stay in L2 while all tiles pass; by tile registers products take less, what a row costs a chunk
// weighs more.
template <class E>
constexpr int64_t kChunkKeys = kOperandRows<E> > kTileRows ? 512 : 256;

template <class S>
class AttentionForward {
 public:
  using T = Compute<S>;
  using E = Operand<S>;
  using V = Vec<T>;
  static constexpr int64_t kRows = kOperandRows<E>;  // of a tile

  // Scratch of one member.
  struct Buffers {
    E *key_panels, *values, *queries;
    E* weights;  // of a tile, where products take them in another type than that of scores
    T *sums, *scores, *factors;
    Softmax<T>* softmax;
    Seen* seen;  // of every tile, in the chunk at hand
    T* given;    // weights to be returned

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const AttentionForwardParams<S>& p, int64_t rows) {
      const int64_t keys = chunk_keys(p);
      Buffers b;
      b.key_panels = workspace.take<E>(keys * panel_depth<E>(p.dim));
      b.values = workspace.take<E>(keys * values_width(p));
      b.queries = workspace.take<E>(rows * row_stride<E>(p.dim));
      b.weights = workspace.take<E>(kApart<E> ? kRows * row_stride<E>(keys) : 0);
      b.sums = workspace.take<T>(rows * row_stride<T>(p.v_dim));
      b.scores = workspace.take<T>(kRows * row_stride<T>(keys));
      b.factors = workspace.take<T>(keys);
      b.softmax = workspace.take<Softmax<T>>(rows);
      b.seen = workspace.take<Seen>(rows);
      b.given = workspace.take<T>(p.weights ? rows * row_stride<T>(keys) : 0);
      return b;
    }
  };

  AttentionForward(const AttentionForwardParams<S>& p, const Buffers& buffers)
      : p_(p),
        buffers_(buffers),
        group_(p.q_heads / p.kv_heads),
        dropout_(Dropout::make(p.dropout, p.seed)),
        q_stride_(row_stride<E>(p.dim)),
        v_stride_(row_stride<T>(p.v_dim)),
        keys_(chunk_keys(p)),
        s_stride_(row_stride<T>(keys_)),
        w_stride_(row_stride<E>(keys_)) {}

  void run(const AttentionItem& item) {
    item_ = item;
    sequence_ = attention_sequence(p_, item.b);
    queries_ = item.end - item.begin;
    tiles_ = (queries_ + kRows - 1) / kRows;
    if (!p_.weights) return kv_head();
    std::fill_n(buffers_.given, (p_.average ? 1 : group_) * queries_ * s_stride_, T(0));
    const int64_t last = p_.average ? p_.kv_heads : item.kv_head + 1;
    for (; item_.kv_head < last; ++item_.kv_head) kv_head();
    item_ = item;
    write_weights();
  }

 private:
  static int64_t chunk_keys(const AttentionForwardParams<S>& p) {
    const int64_t all = std::max<int64_t>(1, (p.k_len + kCols<T> - 1) / kCols<T>) * kCols<T>;
    return p.weights ? all : std::min(all, kChunkKeys<E>);
  }
  // Of values as operands: in rows, or in panels of pairs of tiles, one after another.
  static int64_t values_width(const AttentionForwardParams<S>& p) {
    return kSplit<E> ? panel_depth<E>(p.v_dim) : row_stride<T>(p.v_dim);
  }
  // Weights are made in runs of so many vectors, as their operands lie.
  static constexpr int kRun = kSplit<E> ? kSplitColumns / V::kLanes : 1;
  static int64_t run_down(int64_t key) { return key / (kRun * V::kLanes) * (kRun * V::kLanes); }
  static int64_t run_up(int64_t key) { return run_down(key + kRun * V::kLanes - 1); }

  void kv_head() {
    start();
    const int64_t last = reach().end;
    for (int64_t first = reach().begin / keys_ * keys_; first < last; first += keys_) chunk(first);
    finish();
  }
  int64_t head(int64_t g) const { return item_.kv_head * group_ + g; }
  HeadScores<S> scores(int64_t g) const { return {p_, sequence_, item_.b, head(g)}; }
  // Tile t's queries, counted from the item's first.
  Team::Range tile(int64_t t) const { return {queries_ * t / tiles_, queries_ * (t + 1) / tiles_}; }

  void start() {
    for (int64_t g = 0; g < group_; ++g)
      copy_rows(p_.q.row(item_.b, head(g), sequence_.q_begin + item_.begin), p_.q.time, queries_, p_.dim,
                buffers_.queries + g * queries_ * q_stride_, q_stride_);
    std::fill_n(buffers_.sums, group_ * queries_ * v_stride_, T(0));
    std::fill_n(buffers_.softmax, group_ * queries_, Softmax<T>::start());
  }

  // What the item's queries see, the mask apart.
  Keys reach() const {
    const auto any = scores(0);
    return {any.seen(item_.begin).begin, any.seen(item_.end - 1).end};
  }

  void chunk(int64_t first) {
    const int64_t last = std::min(first + keys_, sequence_.k_len);
    Keys needed{keys_, 0};
    for (int64_t g = 0; g < group_; ++g) {
      const auto rule = scores(g);
      for (int64_t t = 0; t < tiles_; ++t) {
        const Seen seen = rule.seen(item_.begin + tile(t).begin, item_.begin + tile(t).end, first, last);
        const Keys keys = seen.keys.less(first);
        buffers_.seen[g * tiles_ + t] = {keys, seen.masked};
        if (!keys.empty()) needed = {std::min(needed.begin, keys.begin), std::max(needed.end, keys.end)};
      }
    }
    if (needed.empty()) return;
    pack(first, needed);
    for (int64_t g = 0; g < group_; ++g) {
      const auto rule = scores(g);
      for (int64_t t = 0; t < tiles_; ++t)
        if (const Seen seen = buffers_.seen[g * tiles_ + t]; !seen.keys.empty()) {
          if constexpr (kSplit<E>)
            attend_split(rule, g, tile(t), first, seen);
          else
            attend(rule, g, tile(t), first, seen);
        }
    }
  }

  void pack(int64_t first, Keys keys) {
    const int64_t begin = run_down(keys.begin), row = sequence_.k_begin + first;
    pack_keys(p_.k.row(item_.b, item_.kv_head, row), p_.k.time, keys.begin, keys.end, p_.dim, buffers_.key_panels);
    panel_width_ = panel_width<T>(keys.end);
    const S* values = p_.v.row(item_.b, item_.kv_head, row + begin);
    if constexpr (kSplit<E>)
      pack_part(values, p_.v.time, keys.end - begin, p_.v_dim, buffers_.values + begin * kPairColumns,
                panel_depth<E>(p_.v_dim), pair_step(keys_));
    else
      pack_panel(values, p_.v.time, keys.end - begin, p_.v_dim, buffers_.values + begin * v_stride_, v_stride_);
  }

  // One tile of queries of head g with what it sees of the chunk from `first` on.
  void attend(const HeadScores<S>& rule, int64_t g, Team::Range tile, int64_t first, Seen seen) {
    const Keys keys = seen.keys;
    const int64_t rows = tile.end - tile.begin, place = g * queries_ + tile.begin;
    const int64_t panel = keys.begin / kCols<T> * kCols<T>, begin = lanes_down<T>(keys.begin),
                  end = lanes_up<T>(keys.end), depth = panel_depth<E>(p_.dim);
    T* s = buffers_.scores;
    T* sums = buffers_.sums + place * v_stride_;
    multiply<false>(
        rows, p_.dim, end - panel,
        PanelProduct<E>{buffers_.queries + place * q_stride_, q_stride_, buffers_.key_panels + panel * depth,
                        kPairing<E> * panel_width_, kCols<T> * depth, s + panel, s_stride_},
        false);
    const E* weights = weigh(rule, g, tile, first, seen);
    multiply<false>(
        rows, keys.end - begin, p_.v_dim,
        PanelProduct<E>{weights + begin, kPairs<E> ? w_stride_ : s_stride_, buffers_.values + begin * v_stride_,
                        kPairing<E> * v_stride_, kPairing<E> * kCols<T>, sums, v_stride_},
        true);
  }

  // The same where the operands of products are split: weights after they are known.
  void attend_split(const HeadScores<S>& rule, int64_t g, Team::Range tile, int64_t first, Seen seen) {
    const Keys keys = seen.keys;
    const int64_t rows = tile.end - tile.begin, place = g * queries_ + tile.begin;
    const int64_t begin = run_down(keys.begin), end = lanes_up<T>(keys.end);
    T* s = buffers_.scores;
    for (int64_t n = keys.begin / kCols<T> * kCols<T>; n < end; n += kCols<T>)
      split_tiles(rows, std::min(kCols<T>, end - n),
                  {buffers_.queries + place * q_stride_, buffers_.key_panels + n * panel_depth<E>(p_.dim), s + n,
                   q_stride_, pair_step(p_.dim), s_stride_, p_.dim, nullptr, 0});
    const E* weights = weigh(rule, g, tile, first, seen);
    T* sums = buffers_.sums + place * v_stride_;
    for (int64_t d = 0; d < p_.v_dim; d += kCols<T>)
      split_tiles(rows, std::min(kCols<T>, p_.v_dim - d),
                  {weights + begin, buffers_.values + begin * kPairColumns + d / kPairColumns * pair_step(keys_),
                   sums + d, w_stride_, pair_step(keys_), v_stride_, end - begin, sums + d, v_stride_});
  }

  // Scores of a tile become weights, zero where nothing is seen, and the sums so far are made to match.
  const E* weigh(const HeadScores<S>& rule, int64_t g, Team::Range tile, int64_t first, Seen seen) {
    const auto [keys, masked] = seen;
    const int64_t begin = run_down(keys.begin), end = run_up(keys.end);
    E* weights;
    if constexpr (kApart<E>)
      weights = buffers_.weights;
    else
      weights = buffers_.scores;
    for (int64_t query = item_.begin + tile.begin; query < item_.begin + tile.end; ++query) {
      const int64_t r = query - item_.begin - tile.begin, place = g * queries_ + tile.begin + r;
      T* row = buffers_.scores + r * s_stride_;
      E* to = weights + r * (kApart<E> ? w_stride_ : s_stride_);
      const Keys here = rule.seen(query).less(first).clipped(keys.begin, keys.end);
      if (here.empty()) {
        clear_columns(to, begin, end);
        continue;
      }
      clear_columns(to, begin, run_down(here.begin));
      clear_columns(to, run_up(here.end), end);
      if (!rule.plain(masked)) rule.transform(query, first, here, masked, row, nullptr);
      const T factor = add(buffers_.softmax[place], row, here, rule.factor(), g, query, first, to);
      if (factor != T(1)) scale_row(buffers_.sums + place * v_stride_, factor);
      if (p_.weights) give(to, here, buffers_.softmax[place].sum, p_.average ? query - item_.begin : place);
    }
    return weights;
  }

  // Exponentials of a row over their sum are added to weights that are to be returned.
  FASTLM_NOINLINE void give(const E* exponentials, Keys keys, T sum, int64_t place) const {
    if (sum == 0) return;
    const V factor = V::broadcast(1 / (p_.average ? sum * static_cast<T>(p_.q_heads) : sum));
    T* to = buffers_.given + place * s_stride_;
    for (int64_t i = lanes_down<T>(keys.begin); i < keys.end; i += V::kLanes) {
      const V weights = load_columns<V>(exponentials, i) * factor;  // NaN where one score is, but not outside
      (replace_outside(weights, keys.begin - i, keys.end - i, T(0)) + V::load(to + i)).store(to + i);
    }
  }

  // Weights of the scores of one row, as the products with the values take them.
  T add(Softmax<T>& softmax, T* row, Keys keys, T factor, int64_t g, int64_t query, int64_t first, E* to) {
    if (!dropout_.active())
      return softmax.template add<kRun>(row, keys, factor,
                                        [&](const auto& e, int64_t i) FASTLM_LAMBDA_INLINE { keep(e, to, i); });
    dropout_.factors(lse_place(query, g), first, run_down(keys.begin), run_up(keys.end), buffers_.factors);
    return softmax.template add<kRun>(row, keys, factor, [&](const auto& e, int64_t i) FASTLM_LAMBDA_INLINE {
      keep(e * std::decay_t<decltype(e)>::load(buffers_.factors + i), to, i);
    });
  }
  template <class X>
  static FASTLM_INLINE void keep(const X& weights, E* to, int64_t i) {
    if constexpr (kSplit<E>)
      store_columns(weights, to, i, X::kLanes);
    else if constexpr (!kPairs<E>)
      weights.store(to + i);
    else if constexpr (X::kParts > 1)
      unrolled<X::kParts>([&](int j) FASTLM_LAMBDA_INLINE { store_operand(weights.parts[j], to + i + j * V::kLanes); });
    else
      store_operand(weights, to + i);
  }

  void scale_row(T* row, T factor) const {
    for (int64_t i = 0; i < p_.v_dim; i += V::kLanes) (V::load(row + i) * V::broadcast(factor)).store(row + i);
  }

  int64_t lse_place(int64_t query, int64_t g) const {
    return p_.lse.place(item_.b, head(g), sequence_.q_begin + query);
  }

  void finish() {
    for (int64_t g = 0; g < group_; ++g) {
      const HeadScores<S> rule = scores(g);
      S* to = p_.output.row(item_.b, head(g), sequence_.q_begin + item_.begin);
      for (int64_t i = 0; i < queries_; ++i, to += p_.output.time) {
        const int64_t place = g * queries_ + i;
        const T lse = write_attended(buffers_.softmax[place], rule, buffers_.sums + place * v_stride_, p_.v_dim, to);
        p_.lse.data[lse_place(item_.begin + i, g)] = lse;
      }
    }
  }

  FASTLM_NOINLINE void write_weights() const {
    const int64_t heads = p_.average ? 1 : p_.q_heads;
    for (int64_t g = 0; g < (p_.average ? 1 : group_); ++g) {
      const int64_t first = (item_.b * heads + (p_.average ? 0 : head(g))) * p_.q_len + item_.begin;
      for (int64_t i = 0; i < queries_; ++i) {
        const T* from = buffers_.given + (g * queries_ + i) * s_stride_;
        S* to = p_.weights + (first + i) * p_.k_len;
        for (int64_t n = 0; n < p_.k_len; n += V::kLanes) store_as(V::load(from + n), to + n, p_.k_len - n);
      }
    }
  }

 public:
  // Divides a query's sums by the sum of its exponentials; returns the logarithm.
  static T write_attended(const Softmax<T>& softmax, const HeadScores<S>& rule, const T* sums, int64_t v_dim, S* to) {
    const bool nothing = softmax.sum == 0;
    const V factor = V::broadcast(1 / softmax.sum);
    for (int64_t d = 0; d < v_dim; d += V::kLanes)
      store_as(nothing ? V::zero() : V::load(sums + d) * factor, to + d, v_dim - d);
    return softmax.lse(rule.scale(), rule.factor());
  }

 private:
  const AttentionForwardParams<S>& p_;
  const Buffers buffers_;
  const int64_t group_;
  const Dropout dropout_;
  const int64_t q_stride_, v_stride_;
  const int64_t keys_, s_stride_, w_stride_;  // of a chunk
  AttentionItem item_{};
  AttentionSequence sequence_{};
  int64_t queries_ = 0, tiles_ = 0, panel_width_ = 0;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
