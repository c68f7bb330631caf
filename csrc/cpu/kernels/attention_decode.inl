// Attention of few queries over many keys, as in decoding with a cache: keys and values are read in place, once for all
// the queries that share them. The keys are split between items; partial results meet afterwards, in fixed order.
#pragma once

#include "cpu/kernels/attention_forward.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// C (R, N vectors) += A (R, depth) B, B's rows read in place; kWhole: all N vectors, else one of `cols` lanes.
// Meanwhile as much memory is called for from `next` on, `step` further at every row.
template <class S, int R, int N, bool kWhole>
void add_weighted_rows(const Compute<S>* a, int64_t a_stride, const S* b, int64_t b_stride, int64_t depth, int64_t cols,
                       Compute<S>* c, int64_t c_stride, const S* next, int64_t step) {
  using V = Vec<Compute<S>>;
  static_assert(kWhole || N == 1);
  constexpr int kLines = std::max<int>(1, N * V::kLanes / kLine<S>);
  V acc[R][N];
  const auto place = [&](int r, int v) FASTLM_LAMBDA_INLINE { return c + r * c_stride + v * V::kLanes; };
  unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE { acc[r][v] = V::load(place(r, v)); });
  for (int64_t k = 0; k < depth; ++k, b += b_stride, next += step) {
    unrolled<kLines>([&](int i) FASTLM_LAMBDA_INLINE { __builtin_prefetch(next + i * kLine<S>, 0, 2); });
    V row[N];
    for (int v = 0; v < N; ++v) row[v] = load_as<V>(b + v * V::kLanes, kWhole ? V::kLanes : cols);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) acc[r][v] = fma(V::broadcast(a[r * a_stride + k]), row[v], acc[r][v]);
  }
  unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE { acc[r][v].store(place(r, v)); });
}

template <class S>
class AttentionDecode {
 public:
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int64_t kBlockKeys = 64;

  struct Buffers {
    T *queries, *scores;  // of one member
    T* sums;              // of all items, as what follows
    Softmax<T>* softmax;

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const AttentionParams<S>& p, const AttentionPlan& plan) {
      Buffers b;
      const int64_t rows = plan.most_rows, items = static_cast<int64_t>(plan.items.size());
      b.queries = workspace.take<T>(plan.threads * rows * row_stride<T>(p.dim));
      b.scores = workspace.take<T>(plan.threads * rows * row_stride<T>(kBlockKeys));
      b.sums = workspace.take<T>(items * rows * row_stride<T>(p.v_dim));
      b.softmax = workspace.take<Softmax<T>>(items * rows);
      return b;
    }
  };

  AttentionDecode(const AttentionForwardParams<S>& p, const AttentionPlan& plan, const Buffers& buffers, int rank)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        group_(p.q_heads / p.kv_heads),
        dropout_(Dropout::make(p.dropout, p.seed)),
        q_stride_(row_stride<T>(p.dim)),
        v_stride_(row_stride<T>(p.v_dim)),
        queries_(buffers.queries + rank * plan.most_rows * q_stride_),
        scores_(buffers.scores + rank * plan.most_rows * s_stride_) {}

  // Partial results of item i.
  void run(int64_t i) {
    item_ = plan_.items[i];
    sequence_ = attention_sequence(p_, item_.b);
    sums_ = buffers_.sums + i * plan_.most_rows * v_stride_;
    softmax_ = buffers_.softmax + i * plan_.most_rows;
    const int64_t rows = group_ * sequence_.q_len;
    for (int64_t r = 0; r < rows; ++r)
      copy_rows(p_.q.row(item_.b, head(r), place(r)), 0, 1, p_.dim, queries_ + r * q_stride_, q_stride_);
    std::fill_n(sums_, rows * v_stride_, T(0));
    std::fill_n(softmax_, rows, Softmax<T>::start());
    for (int64_t first = item_.begin; first < item_.end; first += kBlockKeys)
      block(first, std::min(first + kBlockKeys, item_.end));
  }

  // Brings together the parts of the head that item i is the first part of.
  void combine(int64_t i) {
    const auto& items = plan_.items;
    if (items[i].part != 0) return;
    item_ = items[i];
    sequence_ = attention_sequence(p_, item_.b);
    size_t last = i + 1;
    while (last < items.size() && items[last].part != 0) ++last;
    for (int64_t r = 0; r < group_ * sequence_.q_len; ++r) combine_row(i, static_cast<int64_t>(last), r);
  }

 private:
  int64_t head(int64_t row) const { return item_.kv_head * group_ + row / sequence_.q_len; }
  int64_t query(int64_t row) const { return row % sequence_.q_len; }
  int64_t place(int64_t row) const { return sequence_.q_begin + query(row); }
  int64_t lse_place(int64_t row) const { return p_.lse.place(item_.b, head(row), place(row)); }

  void block(int64_t first, int64_t last) {
    const int64_t rows = group_ * sequence_.q_len;
    Keys keys{last, first};
    for (int64_t r = 0; r < rows; ++r) {
      const Keys own = HeadScores<S>(p_, sequence_, item_.b, head(r)).seen(query(r), query(r) + 1, first, last).keys;
      if (!own.empty()) keys = {std::min(keys.begin, own.begin), std::max(keys.end, own.end)};
    }
    if (keys.empty()) return;
    const int64_t n = keys.end - keys.begin, row = sequence_.k_begin + keys.begin;
    const S* k = p_.k.row(item_.b, item_.kv_head, row);
    const S* v = p_.v.row(item_.b, item_.kv_head, row);
    // Memory is what this waits for: keys and values of the next block are called for meanwhile, line by line.
    dot_product<S>({queries_, q_stride_, k, p_.k.time, n, p_.dim, scores_, s_stride_, Init::kZero, nullptr, kBlockKeys},
                   rows);
    for (int64_t r = 0; r < rows; ++r) weigh(r, keys);
    add_values(rows, n, v, v + kBlockKeys * p_.v.time);
  }

  // Products with `keys` become what the values are to be multiplied with.
  void weigh(int64_t r, Keys keys) {
    const HeadScores<S> rule(p_, sequence_, item_.b, head(r));
    const Keys own = rule.seen(query(r)).clipped(keys.begin, keys.end);
    const Keys here = own.less(keys.begin);
    const bool masked = p_.keep.data;
    const int64_t end = lanes_up<T>(keys.end - keys.begin);
    T* s = scores_ + r * s_stride_;
    if (here.empty()) {
      std::fill(s, s + end, T(0));
      return;
    }
    std::fill(s, s + lanes_down<T>(here.begin), T(0));
    std::fill(s + lanes_up<T>(here.end), s + end, T(0));
    if (!rule.plain(masked)) rule.transform(query(r), keys.begin, here, masked, s, nullptr);
    const T factor =
        softmax_[r].add(s, here, rule.factor(), [&](const auto& e, int64_t i) FASTLM_LAMBDA_INLINE { e.store(s + i); });
    T* sums = sums_ + r * v_stride_;
    for (int64_t d = 0; factor != T(1) && d < p_.v_dim; d += V::kLanes)
      (V::load(sums + d) * V::broadcast(factor)).store(sums + d);
    if (!dropout_.active()) return;
    T factors[kBlockKeys];
    dropout_.factors(lse_place(r), keys.begin, 0, end, factors);
    for (int64_t i = 0; i < end; ++i) s[i] *= factors[i];
  }

  // The columns from d on, N vectors at a time as long as there are so many, then half of that. Meanwhile the same of
  // `next` is called for, in the order in which dense rows lie: memory gives neighbours faster.
  template <int R, int N>
  void add_values_of(int64_t r, int64_t n, const S* v, const S* next, int64_t d = 0) {
    const bool dense = p_.v.time == p_.v_dim;
    const auto add = [&](auto whole) {
      add_weighted_rows<S, R, N, decltype(whole)::value>(scores_ + r * s_stride_, s_stride_, v + d, p_.v.time, n,
                                                         p_.v_dim - d, sums_ + r * v_stride_ + d, v_stride_,
                                                         next + (dense ? n * d : d), dense ? N * V::kLanes : p_.v.time);
    };
    for (; d + N * V::kLanes <= p_.v_dim; d += N * V::kLanes) add(std::true_type{});
    if (d == p_.v_dim) return;
    if constexpr (N > 1)
      add_values_of<R, N / 2>(r, n, v, next, d);
    else
      add(std::false_type{});
  }
  // Few rows take more columns at a time: that many sums are under way at once.
  void add_values(int64_t rows, int64_t n, const S* v, const S* next) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_values_of<4, 2>(r, n, v, next);
    if (rows - r == 3) add_values_of<3, 2>(r, n, v, next);
    if (rows - r == 2) add_values_of<2, 4>(r, n, v, next);
    if (rows - r == 1) add_values_of<1, 8>(r, n, v, next);
  }

  void combine_row(int64_t first, int64_t last, int64_t r) {
    const auto softmax = [&](int64_t i) -> const Softmax<T>& { return buffers_.softmax[i * plan_.most_rows + r]; };
    const auto sums = [&](int64_t i) { return buffers_.sums + (i * plan_.most_rows + r) * v_stride_; };
    const HeadScores<S> rule(p_, sequence_, item_.b, head(r));
    Softmax<T> whole = softmax(first);
    T* into = sums(first);
    for (int64_t i = first + 1; i < last; ++i) {
      const Softmax<T>& other = softmax(i);
      if (other.sum == 0) continue;
      const T max = !(other.max <= whole.max) ? other.max : whole.max;
      const T mine = whole.sum == 0 ? T(0) : rescaling(whole.max, max, rule.factor());
      const T theirs = rescaling(other.max, max, rule.factor());
      whole = {max, whole.sum * mine + other.sum * theirs};
      for (int64_t d = 0; d < p_.v_dim; d += V::kLanes)
        fma(V::load(into + d), V::broadcast(mine), V::load(sums(i) + d) * V::broadcast(theirs)).store(into + d);
    }
    S* to = p_.output.row(item_.b, head(r), place(r));
    p_.lse.data[lse_place(r)] = AttentionForward<S>::write_attended(whole, rule, into, p_.v_dim, to);
  }

  const AttentionForwardParams<S>& p_;
  const AttentionPlan& plan_;
  const Buffers& buffers_;
  const int64_t group_;
  const Dropout dropout_;
  const int64_t q_stride_, v_stride_, s_stride_ = row_stride<T>(kBlockKeys);
  T *const queries_, *const scores_;
  T* sums_ = nullptr;
  Softmax<T>* softmax_ = nullptr;
  AttentionItem item_{};
  AttentionSequence sequence_{};
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
