// Attention backward (Dao et al. 2022, algorithm 4): weights are computed again from lse, block by block.
//
// An item is a range of keys of one head and all queries that share it. Blocks of keys are the outer loop, blocks of
// queries the inner one; five products a block. With P the weights and delta = sum(grad_output * output):
//   dV += P^T dO,  dS = P * (dO V^T - delta),  dK += dS^T Q,  dQ += dS K.
#pragma once

#include "cpu/kernels/attention_forward.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S>
class AttentionBackward {
 public:
  using T = Compute<S>;
  using E = Operand<S>;
  using V = Vec<T>;
  static constexpr int64_t kBlockKeys = 64, kBlockQueries = 128;  // both matrices of a block stay near
  static constexpr int64_t kRows = kOperandRows<E>;               // of a tile

  struct Buffers {
    // Of one member. Rows: all queries, or all keys of an item.
    E *queries, *grads, *query_panels, *grad_panels;  // the panels are the rows where products take numbers
    T *grad_q, *delta, *grad_k, *grad_v;
    E *key_panels, *value_panels, *key_rows;  // of a block of keys
    T *weights, *grad_scores, *capped, *factors;
    E *weight_columns, *grad_columns, *grad_rows;  // of a block, as products take them; the same again
    Seen* tiles;                                   // what tiles of a block see
    Keys* rows;                                    // what its rows do
    T* partial;                                    // of all members: gradients of q by part, where there are several

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const AttentionBackwardParams<S>& p,
                                        const AttentionPlan& plan, int64_t query_rows) {
      const int64_t q_stride = row_stride<T>(p.dim), v_stride = row_stride<T>(p.v_dim);
      const int64_t s_stride = row_stride<T>(kBlockKeys), block = kBlockQueries * s_stride;
      const int64_t q_len = even_up(p.q_len);
      Buffers b{};
      b.queries = workspace.take<E>(q_len * row_stride<E>(p.dim));
      b.grads = workspace.take<E>(q_len * row_stride<E>(p.v_dim));
      b.query_panels = kPairs<E> ? workspace.take<E>(blocks(p.q_len) * kBlockQueries * q_stride) : b.queries;
      b.grad_panels = kPairs<E> ? workspace.take<E>(blocks(p.q_len) * kBlockQueries * v_stride) : b.grads;
      b.grad_q = workspace.take<T>(p.q_len * q_stride);
      b.delta = workspace.take<T>(p.q_len);
      b.grad_k = workspace.take<T>(plan.most_rows * q_stride);
      b.grad_v = workspace.take<T>(plan.most_rows * v_stride);
      b.key_panels = workspace.take<E>(kBlockKeys * panel_depth<E>(p.dim));
      b.value_panels = workspace.take<E>(kBlockKeys * panel_depth<E>(p.v_dim));
      b.key_rows = workspace.take<E>(kBlockKeys * q_stride);
      b.weights = workspace.take<T>(block);
      b.grad_scores = workspace.take<T>(block);
      b.capped = workspace.take<T>(kBlockKeys);
      b.factors = workspace.take<T>(kBlockKeys);
      if constexpr (kPairs<E>) {
        b.weight_columns = workspace.take<E>(block);
        b.grad_columns = workspace.take<E>(block);
        b.grad_rows = workspace.take<E>(block);
      } else {
        b.weight_columns = b.weights, b.grad_columns = b.grad_rows = b.grad_scores;
      }
      b.tiles = workspace.take<Seen>(kBlockQueries);
      b.rows = workspace.take<Keys>(kBlockQueries);
      b.partial = workspace.take<T>(query_rows * p.dim);
      return b;
    }
  };

  AttentionBackward(const AttentionBackwardParams<S>& p, const AttentionPlan& plan, const Buffers& buffers)
      : p_(p),
        plan_(plan),
        buffers_(buffers),
        group_(p.q_heads / p.kv_heads),
        dropout_(Dropout::make(p.dropout, p.seed)),
        q_stride_(row_stride<T>(p.dim)),
        v_stride_(row_stride<T>(p.v_dim)),
        q_rows_stride_(row_stride<E>(p.dim)),
        v_rows_stride_(row_stride<E>(p.v_dim)) {}

  // How many rows dQ has in all, once for every part where there are several.
  static int64_t partial_rows(const AttentionBackwardParams<S>& p, const AttentionPlan& plan) {
    return plan.parts > 1 ? plan.parts * places(p) : 0;
  }

  void run(const AttentionItem& item) {
    part_ = item.part;
    for (b_ = item.b; b_ < (plan_.all_batches ? p_.batch : item.b + 1); ++b_) {
      sequence_ = attention_sequence(p_, b_);
      begin_ = std::min(item.begin, sequence_.k_len), end_ = std::min(item.end, sequence_.k_len);
      for (kv_head_ = item.kv_head; kv_head_ < (plan_.all_heads ? p_.kv_heads : item.kv_head + 1); ++kv_head_)
        kv_head();
    }
  }

  // Adds up the parts of dQ of one head (b, head).
  void combine(int64_t b, int64_t head) {
    b_ = b, sequence_ = attention_sequence(p_, b);
    const int64_t count = places(p_);
    for (int64_t i = 0; i < sequence_.q_len; ++i) {
      T* sum = buffers_.partial + lse_place(head, i) * p_.dim;
      for (int64_t part = 1; part < plan_.parts; ++part)
        for (int64_t d = 0; d < p_.dim; ++d) sum[d] += sum[part * count * p_.dim + d];
      write_row(sum, p_.dim, p_.scale, grad_q_row(head, i));
    }
  }

 private:
  // Of lse, which packed sequences need not fill: rows may follow the last.
  static int64_t places(const AttentionBackwardParams<S>& p) {
    return p.q_starts ? p.q_heads * p.lse.head : p.batch * p.lse.batch;
  }
  int64_t lse_place(int64_t head, int64_t query) const { return p_.lse.place(b_, head, sequence_.q_begin + query); }
  S* grad_q_row(int64_t head, int64_t query) const { return p_.grad_q.row(b_, head, sequence_.q_begin + query); }

  void kv_head() {
    const int64_t keys = end_ - begin_;
    std::fill_n(buffers_.grad_k, keys * q_stride_, T(0));
    std::fill_n(buffers_.grad_v, keys * v_stride_, T(0));
    for (int64_t g = 0; g < group_; ++g) q_head(kv_head_ * group_ + g);
    for (int64_t n = 0; n < keys; ++n) {
      const int64_t row = sequence_.k_begin + begin_ + n;
      write_row(buffers_.grad_k + n * q_stride_, p_.dim, p_.scale, p_.grad_k.row(b_, kv_head_, row));
      write_row(buffers_.grad_v + n * v_stride_, p_.v_dim, T(1), p_.grad_v.row(b_, kv_head_, row));
    }
  }

  static void write_row(const T* from, int64_t width, T factor, S* to) {
    for (int64_t i = 0; i < width; i += V::kLanes)
      store_as(V::load_partial(from + i, width - i) * V::broadcast(factor), to + i, width - i);
  }

  void q_head(int64_t head) {
    if (sequence_.q_len == 0) return;
    head_ = head;
    load_queries();
    const HeadScores<S> rule(p_, sequence_, b_, head);
    for (int64_t key = begin_; key < end_; key += kBlockKeys) key_block(rule, key, std::min(end_, key + kBlockKeys));
    for (int64_t i = 0; i < sequence_.q_len; ++i) {
      const T* sum = buffers_.grad_q + i * q_stride_;
      if (plan_.parts == 1)
        write_row(sum, p_.dim, p_.scale, grad_q_row(head, i));
      else
        std::copy_n(sum, p_.dim, buffers_.partial + (part_ * places(p_) + lse_place(head, i)) * p_.dim);
    }
  }

  void load_queries() {
    const int64_t n = sequence_.q_len;
    const S* q = p_.q.row(b_, head_, sequence_.q_begin);
    const S* grad = p_.grad_output.row(b_, head_, sequence_.q_begin);
    copy_rows(q, p_.q.time, n, p_.dim, buffers_.queries, q_rows_stride_);
    copy_rows(grad, p_.grad_output.time, n, p_.v_dim, buffers_.grads, v_rows_stride_);
    for (int64_t i = 0; kPairs<E> && i < blocks(n); ++i) {
      const auto [begin, end] = block(i);
      const int64_t place = i * kBlockQueries;
      pack_panel(q + begin * p_.q.time, p_.q.time, end - begin, p_.dim, buffers_.query_panels + place * q_stride_,
                 q_stride_);
      pack_panel(grad + begin * p_.grad_output.time, p_.grad_output.time, end - begin, p_.v_dim,
                 buffers_.grad_panels + place * v_stride_, v_stride_);
    }
    std::fill_n(buffers_.grad_q, n * q_stride_, T(0));
    const S* output = p_.output.row(b_, head_, sequence_.q_begin);
    for (int64_t i = 0; i < n; ++i, output += p_.output.time, grad += p_.grad_output.time) {
      V sum = V::zero();
      for (int64_t d = 0; d < p_.v_dim; d += V::kLanes)
        sum = fma(load_as<V>(output + d, p_.v_dim - d), load_as<V>(grad + d, p_.v_dim - d), sum);
      buffers_.delta[i] = total(sum);
      if (p_.grad_lse.data) buffers_.delta[i] -= *p_.grad_lse.row(b_, head_, sequence_.q_begin + i);
    }
  }

  static int64_t blocks(int64_t queries) { return (queries + kBlockQueries - 1) / kBlockQueries; }
  Team::Range block(int64_t i) const {
    const int64_t n = sequence_.q_len, count = blocks(n);
    return {n * i / count, n * (i + 1) / count};
  }

  void key_block(const HeadScores<S>& rule, int64_t first, int64_t last) {
    bool packed = false;
    for (int64_t i = 0; i < blocks(sequence_.q_len); ++i) {
      const auto queries = block(i);
      if (!look(rule, queries, first, last)) continue;
      if (!packed) pack(first, last);
      packed = true;
      weigh(rule, queries, first);
      if constexpr (kPairs<E>) make_columns(queries);
      add_to_keys(i, first, last);
    }
  }

  Team::Range tile(Team::Range block, int64_t t) const {
    const int64_t n = block.end - block.begin, tiles = tile_count(block);
    return {block.begin + n * t / tiles, block.begin + n * (t + 1) / tiles};
  }
  static int64_t tile_count(Team::Range block) { return (block.end - block.begin + kRows - 1) / kRows; }

  // What the tiles of a block see; false: nothing.
  bool look(const HeadScores<S>& rule, Team::Range block, int64_t first, int64_t last) {
    bool any = false;
    for (int64_t t = 0; t < tile_count(block); ++t) {
      const auto [keys, masked] = rule.seen(tile(block, t).begin, tile(block, t).end, first, last);
      any |= !keys.empty();
      buffers_.tiles[t] = {keys.empty() ? Keys{0, 0} : keys.less(first), masked};
    }
    return any;
  }

  void pack(int64_t first, int64_t last) {
    const S* k = p_.k.row(b_, kv_head_, sequence_.k_begin + first);
    pack_keys(k, p_.k.time, 0, last - first, p_.dim, buffers_.key_panels);
    pack_keys(p_.v.row(b_, kv_head_, sequence_.k_begin + first), p_.v.time, 0, last - first, p_.v_dim,
              buffers_.value_panels);
    panel_width_ = panel_width<T>(last - first);
    pack_panel(k, p_.k.time, last - first, p_.dim, buffers_.key_rows, q_stride_);
  }

  // Weights and gradients of scores of a block, zero where nothing is seen, and their part of dQ.
  void weigh(const HeadScores<S>& rule, Team::Range block, int64_t first) {
    for (int64_t t = 0; t < tile_count(block); ++t) {
      const auto [begin, end] = tile(block, t);
      const auto [keys, masked] = buffers_.tiles[t];
      T* weights = buffers_.weights + (begin - block.begin) * s_stride_;
      T* grads = buffers_.grad_scores + (begin - block.begin) * s_stride_;
      const int64_t from = lanes_down<T>(keys.begin), to = lanes_up<T>(keys.end);
      for (int64_t r = 0; r < end - begin; ++r)
        for (T* row : {weights + r * s_stride_, grads + r * s_stride_}) {
          std::fill(row, row + from, T(0));
          std::fill(row + to, row + kBlockKeys, T(0));
        }
      if (keys.empty()) {
        std::fill_n(buffers_.rows + begin - block.begin, end - begin, Keys{0, 0});
        continue;
      }
      const int64_t panel = keys.begin / kCols<T> * kCols<T>;
      const int64_t q_depth = panel_depth<E>(p_.dim), v_depth = panel_depth<E>(p_.v_dim);
      multiply<false>(end - begin, p_.dim, to - panel,
                      PanelProduct<E>{buffers_.queries + begin * q_rows_stride_, q_rows_stride_,
                                      buffers_.key_panels + panel * q_depth, kPairing<E> * panel_width_,
                                      kCols<T> * q_depth, weights + panel, s_stride_},
                      false);
      multiply<false>(end - begin, p_.v_dim, to - panel,
                      PanelProduct<E>{buffers_.grads + begin * v_rows_stride_, v_rows_stride_,
                                      buffers_.value_panels + panel * v_depth, kPairing<E> * panel_width_,
                                      kCols<T> * v_depth, grads + panel, s_stride_},
                      false);
      for (int64_t r = 0; r < end - begin; ++r) {
        std::fill(weights + r * s_stride_ + panel, weights + r * s_stride_ + from, T(0));
        std::fill(grads + r * s_stride_ + panel, grads + r * s_stride_ + from, T(0));
        const Keys own = rule.seen(begin + r).less(first).clipped(keys.begin, keys.end);
        buffers_.rows[begin - block.begin + r] =
            weigh_row(rule, begin + r, first, own, masked, from, to, weights + r * s_stride_, grads + r * s_stride_);
      }
      E* rows = buffers_.grad_rows + (begin - block.begin) * s_stride_;
      if constexpr (kPairs<E>)
        for (int64_t r = 0; r < end - begin; ++r) round_row(grads + r * s_stride_, rows + r * s_stride_);
      multiply<false>(
          end - begin, keys.end - from, p_.dim,
          PanelProduct<E>{rows + from, s_stride_, buffers_.key_rows + from * q_stride_, kPairing<E> * q_stride_,
                          kPairing<E> * kCols<T>, buffers_.grad_q + begin * q_stride_, q_stride_},
          true);
    }
  }

  // A row of a block's matrix as an operand.
  static void round_row(const T* from, BFloat16* to) {
    for (int64_t i = 0; i < kBlockKeys; i += V::kLanes) store_operand(V::load(from + i), to + i);
  }

  // Both matrices of a block with their rows in pairs.
  void make_columns(Team::Range block) {
    const int64_t rows = block.end - block.begin;
    for (const auto& [from, to] :
         {std::pair{buffers_.weights, buffers_.weight_columns}, std::pair{buffers_.grad_scores, buffers_.grad_columns}})
      for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < kBlockKeys; i += V::kLanes) {
          const T* row = from + r * s_stride_ + i;
          const FloatBits words = pair_lanes(operand_bits(V::load(row)),
                                             r + 1 < rows ? operand_bits(V::load(row + s_stride_)) : FloatBits{});
          memcpy(to + r * s_stride_ + 2 * i, &words, sizeof(words));
        }
  }

  // Products with keys become weights (dropped ones zero), products with values the gradients of scores, in [from, to).
  Keys weigh_row(const HeadScores<S>& rule, int64_t query, int64_t first, Keys own, bool masked, int64_t from,
                 int64_t to, T* weights, T* grads) {
    const T lse = p_.lse.data[lse_place(head_, query)];
    if (own.empty() || lse == -std::numeric_limits<T>::infinity()) {
      std::fill(weights + from, weights + to, T(0));
      std::fill(grads + from, grads + to, T(0));
      return {0, 0};
    }
    if (!rule.plain(masked)) rule.transform(query, first, own, masked, weights, buffers_.capped);
    const T scale = rule.scale(), factor = rule.factor(), top = lse / scale, delta = buffers_.delta[query];
    const bool small = is_small(top, factor), drops = dropout_.active();
    // An error here is one of all weights of the query: what rounding took from lse / scale * factor is kept.
    const T rest = std::fma(-top, scale, lse) / scale * factor + (small ? rounded_off(top, factor) : T(0));
    if (drops) dropout_.factors(static_cast<uint64_t>(lse_place(head_, query)), first, from, to, buffers_.factors);
    for_vectors<T>(from, to, [&](auto kind, int64_t i) FASTLM_LAMBDA_INLINE {
      using W = decltype(kind);
      const W weight = exponential<W>(weights + i, factor, top, small, rest);
      W grad = W::load(grads + i), kept = weight;
      if (drops) {
        const W dropped = W::load(buffers_.factors + i);
        grad = grad * dropped, kept = weight * dropped;
      }
      kept.store(weights + i);
      (weight * (grad - W::broadcast(delta))).store(grads + i);
    });
    for (T* row : {weights, grads}) fill_outside(row, from, to, own, T(0));
    if (p_.grad_bias.data) add_to_bias(query, first, own, grads);
    if (p_.softcap != 0)
      for (int64_t i = own.begin; i < own.end; ++i) {
        const T ratio = buffers_.capped[i] / p_.softcap;
        grads[i] *= 1 - ratio * ratio;
      }
    return own;
  }

  void add_to_bias(int64_t query, int64_t first, Keys own, const T* grads) const {
    const auto& to = p_.grad_bias;
    T* row = to.data + b_ * to.batch + head_ * to.head + query * to.query + first * to.key;
    for (int64_t i = own.begin; i < own.end; ++i) row[i * to.key] += grads[i];
  }

  // The part of block i of dK and dV, for tiles of keys, over the queries that see some of them.
  void add_to_keys(int64_t i, int64_t first, int64_t last) {
#ifdef FASTLM_BFLOAT16_TILES
    static_assert(kBlockQueries <= kColumnDepth);
#endif
    const auto queries = block(i);
    const int64_t rows = queries.end - queries.begin, keys = last - first, tiles = (keys + kRows - 1) / kRows;
    const int64_t place = kPairs<E> ? i * kBlockQueries : queries.begin;  // of the block's first in the panels
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t n = keys * t / tiles, end = keys * (t + 1) / tiles, key = first - begin_ + n;
      const auto sees = [&](int64_t r) { return buffers_.rows[r].begin < end && buffers_.rows[r].end > n; };
      int64_t low = 0, high = rows;
      while (low < high && !sees(low)) ++low;
      while (low < high && !sees(high - 1)) --high;
      if (low == high) continue;
      low = low / kPairing<E> * kPairing<E>;
      multiply<true>(
          end - n, high - low, p_.v_dim,
          PanelProduct<E>{buffers_.weight_columns + low * s_stride_ + kPairing<E> * n, kPairing<E> * s_stride_,
                          buffers_.grad_panels + (place + low) * v_stride_, kPairing<E> * v_stride_,
                          kPairing<E> * kCols<T>, buffers_.grad_v + key * v_stride_, v_stride_},
          true);
      multiply<true>(end - n, high - low, p_.dim,
                     PanelProduct<E>{buffers_.grad_columns + low * s_stride_ + kPairing<E> * n, kPairing<E> * s_stride_,
                                     buffers_.query_panels + (place + low) * q_stride_, kPairing<E> * q_stride_,
                                     kPairing<E> * kCols<T>, buffers_.grad_k + key * q_stride_, q_stride_},
                     true);
    }
  }

  const AttentionBackwardParams<S>& p_;
  const AttentionPlan& plan_;
  const Buffers buffers_;
  const int64_t group_;
  const Dropout dropout_;
  const int64_t q_stride_, v_stride_, s_stride_ = row_stride<T>(kBlockKeys);
  const int64_t q_rows_stride_, v_rows_stride_;  // of the operands' rows
  int64_t b_ = 0, kv_head_ = 0, head_ = 0, part_ = 0, begin_ = 0, end_ = 0, panel_width_ = 0;
  AttentionSequence sequence_{};
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
