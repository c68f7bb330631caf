// Attention backward (Dao et al. 2022, algorithm 4): weights are computed again from lse, block by block.
//
// An item is a range of keys of one head and all queries that share it. Spans of queries are the outer loop, then
// blocks of keys, then blocks of queries; five products a block. With P the weights and delta = sum(grad_output *
// output):
//   dV += P^T dO,  dS = P * (dO V^T - delta),  dK += dS^T Q,  dQ += dS K.
#pragma once

#include "cpu/kernels/attention_backward_products.inl"
#include "cpu/kernels/attention_forward.inl"
#ifdef FASTLM_FLOATS_ELSEWHERE
#include "cpu/kernels/attention_backward_split.inl"
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S>
class AttentionBackward {
 public:
  using T = Compute<S>;
  using V = Vec<T>;
  using Products = BackwardProducts<S>;
  static constexpr int64_t kBlockKeys = kBackwardKeys, kBlockQueries = kBackwardQueries;

  // What weights of a query are made of: 2^(factor (product - top) - rest).
  struct Query {
    T top, rest, delta;
    bool small, nothing;  // nothing: it sees no key
  };

  struct Buffers {
    // Of one member.
    typename Products::Buffers products;
    Query* queries;  // of a span
    T *capped, *factors;
    Seen* tiles;  // what tiles of a block see
    Keys* rows;   // what its rows do
    T* partial;   // of all members: gradients of q by part, where there are several

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const AttentionBackwardParams<S>& p,
                                        const AttentionPlan& plan, int64_t query_rows) {
      Buffers b{};
      b.products = Products::Buffers::take(workspace, p, plan.most_rows);
      b.queries = workspace.take<Query>(Products::span(p));
      b.capped = workspace.take<T>(kBlockKeys);
      b.factors = workspace.take<T>(kBlockKeys);
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
        products_(p, plan.most_rows, buffers.products),
        group_(p.q_heads / p.kv_heads),
        span_(Products::span(p)),
        dropout_(Dropout::make(p.dropout, p.seed)) {}

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
    products_.start_keys(end_ - begin_);
    for (int64_t g = 0; g < group_; ++g) q_head(kv_head_ * group_ + g);
    const int64_t row = sequence_.k_begin + begin_;
    products_.each_key(
        end_ - begin_,
        [&](int64_t n, int64_t d, int64_t width, const T* grad_k) {
          write_row(grad_k, width, p_.scale, p_.grad_k.row(b_, kv_head_, row + n) + d);
        },
        [&](int64_t n, int64_t d, int64_t width, const T* grad_v) {
          write_row(grad_v, width, T(1), p_.grad_v.row(b_, kv_head_, row + n) + d);
        });
  }

  static void write_row(const T* from, int64_t width, T factor, S* to) {
    for (int64_t i = 0; i < width; i += V::kLanes)
      store_as(V::load_partial(from + i, width - i) * V::broadcast(factor), to + i, width - i);
  }

  void q_head(int64_t head) {
    head_ = head;
    const HeadScores<S> rule(p_, sequence_, b_, head);
    for (first_ = 0; first_ < sequence_.q_len; first_ += span_) {
      count_ = std::min(span_, sequence_.q_len - first_);
      load_queries(rule);
      for (int64_t key = begin_; key < end_; key += kBlockKeys) key_block(rule, key, std::min(end_, key + kBlockKeys));
      for (int64_t i = 0; i < count_; ++i) {
        const T* sum = products_.grad_q(i);
        if (plan_.parts == 1)
          write_row(sum, p_.dim, p_.scale, grad_q_row(head, first_ + i));
        else
          std::copy_n(sum, p_.dim, buffers_.partial + (part_ * places(p_) + lse_place(head, first_ + i)) * p_.dim);
      }
    }
  }

  void load_queries(const HeadScores<S>& rule) {
    const int64_t row = sequence_.q_begin + first_;
    const S* grad = p_.grad_output.row(b_, head_, row);
    products_.load_queries(p_.q.row(b_, head_, row), grad, count_);
    const S* output = p_.output.row(b_, head_, row);
    const T scale = rule.scale(), factor = rule.factor();
    for (int64_t i = 0; i < count_; ++i, output += p_.output.time, grad += p_.grad_output.time) {
      V sum = V::zero();
      for (int64_t d = 0; d < p_.v_dim; d += V::kLanes) {
        __builtin_prefetch(output + kRowsAhead * p_.output.time + d);
        sum = fma(load_as<V>(output + d, p_.v_dim - d), load_as<V>(grad + d, p_.v_dim - d), sum);
      }
      Query& query = buffers_.queries[i];
      query.delta = total(sum);
      if (p_.grad_lse.data) query.delta -= *p_.grad_lse.row(b_, head_, row + i);
      const T lse = p_.lse.data[lse_place(head_, first_ + i)];
      query.nothing = lse == -std::numeric_limits<T>::infinity();
      query.top = lse / scale, query.small = is_small(query.top, factor);
      // An error here is one of all weights of the query: what rounding took from lse / scale * factor is kept.
      query.rest =
          std::fma(-query.top, scale, lse) / scale * factor + (query.small ? rounded_off(query.top, factor) : T(0));
    }
  }

  void key_block(const HeadScores<S>& rule, int64_t first, int64_t last) {
    bool packed = false;
    for (int64_t i = 0; i < Products::blocks(count_); ++i) {
      const auto queries = Products::block(i, count_);
      if (!look(rule, queries, first, last)) continue;
      if (!packed) {
        const int64_t row = sequence_.k_begin + first;
        products_.pack_keys(p_.k.row(b_, kv_head_, row), p_.v.row(b_, kv_head_, row), last - first);
      }
      packed = true;
      weigh(rule, queries, first);
      products_.add_to_keys(i, queries, first - begin_, last - first, buffers_.rows);
    }
  }

  // What the tiles of a block see; false: nothing.
  bool look(const HeadScores<S>& rule, Team::Range block, int64_t first, int64_t last) {
    bool any = false;
    for (int64_t t = 0; t < Products::tiles(block); ++t) {
      const auto tile = Products::tile(block, t);
      const auto [keys, masked] = rule.seen(first_ + tile.begin, first_ + tile.end, first, last);
      any |= !keys.empty();
      buffers_.tiles[t] = {keys.empty() ? Keys{0, 0} : keys.less(first), masked};
    }
    return any;
  }

  // Weights and gradients of scores of a block, zero where nothing is seen, and their part of dQ.
  void weigh(const HeadScores<S>& rule, Team::Range block, int64_t first) {
    const auto each_tile = [&](auto... steps) FASTLM_LAMBDA_INLINE {
      for (int64_t t = 0; t < Products::tiles(block); ++t) (steps(Products::tile(block, t), buffers_.tiles[t]), ...);
    };
    const auto multiply_keys = [&](Team::Range tile, Seen seen) {
      seen.keys.empty() ? products_.clear_tile(block, tile) : products_.multiply_keys(block, tile, seen.keys);
    };
    const auto multiply_values = [&](Team::Range tile, Seen seen) {
      if (!seen.keys.empty()) products_.multiply_values(block, tile, seen.keys);
    };
    const auto weigh_rows = [&](Team::Range tile, Seen seen) { weigh_tile(rule, block, tile, first, seen); };
    const auto add = [&](Team::Range tile, Seen seen) {
      if (!seen.keys.empty()) products_.add_to_queries(block, tile, seen.keys);
    };
    if constexpr (Products::kTogether)
      each_tile(multiply_keys), each_tile(multiply_values), each_tile(weigh_rows), each_tile(add);
    else
      each_tile(multiply_keys, multiply_values, weigh_rows, add);
  }

  void weigh_tile(const HeadScores<S>& rule, Team::Range block, Team::Range tile, int64_t first, Seen seen) {
    const auto [keys, masked] = seen;
    Keys* rows = buffers_.rows + tile.begin - block.begin;
    std::fill_n(rows, tile.end - tile.begin, Keys{0, 0});
    if (keys.empty()) return;
    const auto [weights, grads] = products_.scores(block, tile);
    constexpr int64_t stride = BackwardScores<T>::kStride;
    const int64_t from = lanes_down<T>(keys.begin), to = lanes_up<T>(keys.end);
    for (int64_t r = 0; r < tile.end - tile.begin; ++r) {
      for (T* row : {weights + r * stride, grads + r * stride}) {
        std::fill(row, row + from, T(0));
        std::fill(row + to, row + kBlockKeys, T(0));
      }
      const Keys own = rule.seen(first_ + tile.begin + r).less(first).clipped(keys.begin, keys.end);
      rows[r] = weigh_row(rule, tile.begin + r, first, own, masked, from, to, weights + r * stride, grads + r * stride);
    }
    products_.keep_scores(block, tile);
  }

  // Products with keys become weights (dropped ones zero), products with values the gradients of scores, in [from, to).
  Keys weigh_row(const HeadScores<S>& rule, int64_t i, int64_t first, Keys own, bool masked, int64_t from, int64_t to,
                 T* weights, T* grads) {
    const Query about = buffers_.queries[i];
    if (own.empty() || about.nothing) {
      std::fill(weights + from, weights + to, T(0));
      std::fill(grads + from, grads + to, T(0));
      return {0, 0};
    }
    const int64_t query = first_ + i;
    if (!rule.plain(masked)) rule.transform(query, first, own, masked, weights, buffers_.capped);
    const T factor = rule.factor();
    const bool drops = dropout_.active();
    if (drops) dropout_.factors(static_cast<uint64_t>(lse_place(head_, query)), first, from, to, buffers_.factors);
    for_vectors<T>(from, to, [&](auto kind, int64_t n) FASTLM_LAMBDA_INLINE {
      using W = decltype(kind);
      const W weight = exponential<W>(weights + n, factor, about.top, about.small, about.rest);
      W grad = W::load(grads + n), kept = weight;
      if (drops) {
        const W dropped = W::load(buffers_.factors + n);
        grad = grad * dropped, kept = weight * dropped;
      }
      kept.store(weights + n);
      (weight * (grad - W::broadcast(about.delta))).store(grads + n);
    });
    for (T* row : {weights, grads}) fill_outside(row, from, to, own, T(0));
    if (p_.grad_bias.data) add_to_bias(query, first, own, grads);
    if (p_.softcap != 0)
      for (int64_t n = own.begin; n < own.end; ++n) {
        const T ratio = buffers_.capped[n] / p_.softcap;
        grads[n] *= 1 - ratio * ratio;
      }
    return own;
  }

  void add_to_bias(int64_t query, int64_t first, Keys own, const T* grads) const {
    const auto& to = p_.grad_bias;
    T* row = to.data + b_ * to.batch + head_ * to.head + query * to.query + first * to.key;
    for (int64_t i = own.begin; i < own.end; ++i) row[i * to.key] += grads[i];
  }

  const AttentionBackwardParams<S>& p_;
  const AttentionPlan& plan_;
  const Buffers buffers_;
  Products products_;
  const int64_t group_, span_;
  const Dropout dropout_;
  int64_t b_ = 0, kv_head_ = 0, head_ = 0, part_ = 0, begin_ = 0, end_ = 0;
  int64_t first_ = 0, count_ = 0;  // of the span of queries at hand
  AttentionSequence sequence_{};
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
