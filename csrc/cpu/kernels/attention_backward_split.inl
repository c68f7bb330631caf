// The products of attention backward where floats are split for them. Weights and gradients of scores are made a tile
// at a time; split, with queries as the depth, they are panels for dK and dV, which therefore are made turned, [dim]
// [keys], from queries and gradients as columns.
#pragma once

#include "cpu/kernels/attention_backward_products.inl"
#include "cpu/kernels/split_gemm.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <>
class BackwardProducts<float, SplitFloat> {
 public:
  using T = float;
  using E = SplitFloat;
  using Params = AttentionBackwardParams<float>;
  static constexpr bool kTogether = true;  // tile registers take a while to come up to speed
  static_assert(kBackwardKeys <= kCols<T> && kBackwardQueries % kSplitColumns == 0 && kTilesRows == kSplitColumns);

  struct Buffers {
    E *queries, *grads;                       // rows of a span
    E *query_columns, *grad_columns;          // [dim][span]
    T *grad_q, *grad_k, *grad_v;              // rows of a span; [dim][keys of an item]
    E *key_panels, *value_panels, *key_rows;  // of a block of keys
    BackwardScores<T> scores;
    E *weight_panels, *score_panels, *score_rows;  // the same as operands
    T* rows;                                       // of dK or dV, turned back

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const Params& p, int64_t most_keys) {
      const int64_t n = span(p);
      Buffers b{};
      b.queries = workspace.take<E>(n * row_stride<E>(p.dim));
      b.grads = workspace.take<E>(n * row_stride<E>(p.v_dim));
      b.query_columns = workspace.take<E>(p.dim * row_stride<E>(n));
      b.grad_columns = workspace.take<E>(p.v_dim * row_stride<E>(n));
      b.grad_q = workspace.take<T>(n * row_stride<T>(p.dim));
      b.grad_k = workspace.take<T>(p.dim * row_stride<T>(most_keys));
      b.grad_v = workspace.take<T>(p.v_dim * row_stride<T>(most_keys));
      b.key_panels = workspace.take<E>(kBackwardKeys * panel_depth<E>(p.dim));
      b.value_panels = workspace.take<E>(kBackwardKeys * panel_depth<E>(p.v_dim));
      b.key_rows = workspace.take<E>(kBackwardKeys * panel_depth<E>(p.dim));
      b.scores = BackwardScores<T>::take(workspace);
      b.weight_panels = workspace.take<E>(kBackwardKeys * kBackwardQueries);
      b.score_panels = workspace.take<E>(kBackwardKeys * kBackwardQueries);
      b.score_rows = workspace.take<E>(kBackwardQueries * row_stride<E>(kBackwardKeys));
      b.rows = workspace.take<T>(kBackwardKeys * kCols<T>);
      return b;
    }
  };

  BackwardProducts(const Params& p, int64_t most_keys, const Buffers& buffers)
      : p_(p),
        buffers_(buffers),
        q_stride_(row_stride<E>(p.dim)),
        v_stride_(row_stride<E>(p.v_dim)),
        grad_q_stride_(row_stride<T>(p.dim)),
        columns_stride_(row_stride<E>(span(p))),
        keys_stride_(row_stride<T>(most_keys)) {}

  // Queries at once: what products take of them stays in L2.
  static int64_t span(const Params& p) {
    constexpr int64_t kNumbers = 32768;
    const int64_t fits = kNumbers / std::max(p.dim, p.v_dim) / kBackwardQueries * kBackwardQueries;
    return std::max<int64_t>(1, std::min(p.q_len, std::max(fits, kBackwardQueries)));
  }
  // Of n queries, and tiles of these: whole ones first, as the groups of the depth are.
  static int64_t blocks(int64_t n) { return (n + kBackwardQueries - 1) / kBackwardQueries; }
  static Team::Range block(int64_t i, int64_t n) {
    return {i * kBackwardQueries, std::min(n, (i + 1) * kBackwardQueries)};
  }
  static int64_t tiles(Team::Range block) { return (block.end - block.begin + kTilesRows - 1) / kTilesRows; }
  static Team::Range tile(Team::Range block, int64_t t) {
    return {block.begin + t * kTilesRows, std::min(block.end, block.begin + (t + 1) * kTilesRows)};
  }

  void start_keys(int64_t keys) {
    const auto clear = [&](T* turned, int64_t dim) {
      for (int64_t d = 0; d < dim; ++d) std::fill_n(turned + d * keys_stride_, lanes_up<T>(keys), T(0));
    };
    clear(buffers_.grad_k, p_.dim);
    clear(buffers_.grad_v, p_.v_dim);
  }
  // Columns [d, d + width) of dK and dV of each key.
  template <class WriteK, class WriteV>
  void each_key(int64_t keys, const WriteK& write_k, const WriteV& write_v) {
    turn_back(buffers_.grad_k, p_.dim, keys, write_k);
    turn_back(buffers_.grad_v, p_.v_dim, keys, write_v);
  }

  // n rows of both; dQ begins with zeros.
  void load_queries(const T* q, const T* grad, int64_t n) {
    copy_rows(q, p_.q.time, n, p_.dim, buffers_.queries, q_stride_);
    copy_rows(grad, p_.grad_output.time, n, p_.v_dim, buffers_.grads, v_stride_);
    split_columns(q, p_.q.time, n, p_.dim, buffers_.query_columns, columns_stride_);
    split_columns(grad, p_.grad_output.time, n, p_.v_dim, buffers_.grad_columns, columns_stride_);
    std::fill_n(buffers_.grad_q, n * grad_q_stride_, T(0));
  }
  const T* grad_q(int64_t i) const { return buffers_.grad_q + i * grad_q_stride_; }

  // Of a block.
  void pack_keys(const T* k, const T* v, int64_t keys) {
    pack_transposed(k, p_.k.time, p_.dim, keys, buffers_.key_panels);
    pack_transposed(v, p_.v.time, p_.v_dim, keys, buffers_.value_panels);
    pack_part(k, p_.k.time, keys, p_.dim, buffers_.key_rows, panel_depth<E>(p_.dim), pair_step(kBackwardKeys));
  }

  BackwardScores<T> scores(Team::Range block, Team::Range tile) const { return buffers_.scores.from(block, tile); }

  // Of a tile, in whole vectors: products of its queries with keys, and of their gradients with values.
  void multiply_keys(Team::Range block, Team::Range tile, Keys keys) {
    multiply_tile(tile, keys, p_.dim, buffers_.queries, buffers_.key_panels, scores(block, tile).weights);
  }
  void multiply_values(Team::Range block, Team::Range tile, Keys keys) {
    multiply_tile(tile, keys, p_.v_dim, buffers_.grads, buffers_.value_panels, scores(block, tile).gradients);
  }

  // A tile that sees nothing.
  void clear_tile(Team::Range block, Team::Range tile) {
    for (E* panels : {buffers_.weight_panels, buffers_.score_panels})
      for (int64_t n = 0; n < kBackwardKeys; n += kPairColumns)
        std::fill_n(panels + panel_place(tile.begin - block.begin, n), kTilesRows * kPairColumns, E{});
  }

  // Weights and gradients of scores of a tile are known.
  void keep_scores(Team::Range block, Team::Range tile) {
    const int64_t query = tile.begin - block.begin, rows = tile.end - tile.begin, place = panel_place(query, 0);
    const auto [weights, gradients] = scores(block, tile);
    pack_part(weights, s_stride_, rows, kBackwardKeys, buffers_.weight_panels + place, kBackwardKeys,
              pair_step(kBackwardQueries));
    pack_part(gradients, s_stride_, rows, kBackwardKeys, buffers_.score_panels + place, kBackwardKeys,
              pair_step(kBackwardQueries));
    copy_rows(gradients, s_stride_, rows, kBackwardKeys, buffers_.score_rows + query * rows_stride_, rows_stride_);
  }

  // A tile's part of dQ.
  void add_to_queries(Team::Range block, Team::Range tile, Keys keys) {
    const int64_t from = keys.begin / kSplitColumns * kSplitColumns;
    for (int64_t d = 0; d < p_.dim; d += kCols<T>) {
      T* to = buffers_.grad_q + tile.begin * grad_q_stride_ + d;
      split_tiles(tile.end - tile.begin, std::min(kCols<T>, p_.dim - d),
                  {buffers_.score_rows + (tile.begin - block.begin) * rows_stride_ + from,
                   buffers_.key_rows + from * kPairColumns + d / kPairColumns * pair_step(kBackwardKeys), to,
                   rows_stride_, pair_step(kBackwardKeys), grad_q_stride_, keys.end - from, to, grad_q_stride_});
    }
  }

  // The part of a block of queries of dK and dV of the item's keys from `first` on, over the tiles that see some;
  // `seen`: what each query does.
  void add_to_keys(int64_t, Team::Range queries, int64_t first, int64_t keys, const Keys* seen) {
    const int64_t rows = queries.end - queries.begin;
    for (int64_t n = 0; n < keys; n += kPairColumns) {
      const int64_t end = std::min(keys, n + kPairColumns);
      const auto sees = [&](int64_t r) { return seen[r].begin < end && seen[r].end > n; };
      int64_t low = 0, high = rows;
      while (low < high && !sees(low)) ++low;
      while (low < high && !sees(high - 1)) --high;
      if (low == high) continue;
      low = low / kSplitColumns * kSplitColumns;
      const auto add = [&](int64_t dim, const E* columns, const E* panels, T* to) {
        for (int64_t d = 0; d < dim; d += kTilesRows) {
          T* sums = to + d * keys_stride_ + first + n;
          split_tiles(std::min<int64_t>(kTilesRows, dim - d), end - n,
                      {columns + d * columns_stride_ + queries.begin + low, panels + panel_place(low, n), sums,
                       columns_stride_, pair_step(kBackwardQueries), keys_stride_, high - low, sums, keys_stride_});
        }
      };
      add(p_.v_dim, buffers_.grad_columns, buffers_.weight_panels, buffers_.grad_v);
      add(p_.dim, buffers_.query_columns, buffers_.score_panels, buffers_.grad_k);
    }
  }

 private:
  // In a block's panels, of the tile that begins with that query, key n.
  static int64_t panel_place(int64_t query, int64_t n) {
    return n / kPairColumns * pair_step(kBackwardQueries) + query * kPairColumns;
  }

  void multiply_tile(Team::Range tile, Keys keys, int64_t dim, const E* rows, const E* panels, T* to) {
    const int64_t stride = row_stride<E>(dim), n = keys.begin / kPairColumns * kPairColumns;
    split_tiles(tile.end - tile.begin, keys.end - n,
                {rows + tile.begin * stride, panels + n * panel_depth<E>(dim), to + n, stride, pair_step(dim),
                 s_stride_, dim, nullptr, 0});
  }

  template <class Write>
  void turn_back(const T* turned, int64_t dim, int64_t keys, const Write& write) {
    for (int64_t n = 0; n < keys; n += kBackwardKeys)
      for (int64_t d = 0; d < dim; d += kCols<T>) {
        const int64_t count = std::min(kBackwardKeys, keys - n), width = std::min(kCols<T>, dim - d);
        pack_transposed(turned + d * keys_stride_ + n, keys_stride_, count, width, buffers_.rows);
        for (int64_t i = 0; i < count; ++i) write(n + i, d, width, buffers_.rows + i * kCols<T>);
      }
  }

  const Params& p_;
  const Buffers buffers_;
  const int64_t q_stride_, v_stride_, grad_q_stride_;
  const int64_t columns_stride_, keys_stride_;
  static constexpr int64_t s_stride_ = BackwardScores<T>::kStride, rows_stride_ = row_stride<E>(kBackwardKeys);
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
