// The products of attention backward, of numbers and of pairs: a block's weights and gradients of scores lie in rows.
#pragma once

#include "cpu/kernels/attention_scores.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int64_t kBackwardKeys = 64, kBackwardQueries = 128;  // of a block: both its matrices stay near

// Weights and gradients of scores of a block, or from one of its tiles on, in rows.
template <class T>
struct BackwardScores {
  static constexpr int64_t kStride = row_stride<T>(kBackwardKeys);
  T *weights, *gradients;

  static BackwardScores take(Workspace& workspace) {
    T* const weights = workspace.take<T>(kBackwardQueries * kStride);
    return {weights, workspace.take<T>(kBackwardQueries * kStride)};
  }
  BackwardScores from(Team::Range block, Team::Range tile) const {
    const int64_t place = (tile.begin - block.begin) * kStride;
    return {weights + place, gradients + place};
  }
};

template <class S, class E = Operand<S>>
class BackwardProducts {
 public:
  using T = Compute<S>;
  using V = Vec<T>;
  static constexpr int64_t kRows = kOperandRows<E>;  // of a tile
  static constexpr bool kTogether = false;           // whether one kind of work is done for all tiles of a block

  struct Buffers {
    // Rows: all queries, or all keys of an item.
    E *queries, *grads, *query_panels, *grad_panels;  // the panels are the rows where products take numbers
    T *grad_q, *grad_k, *grad_v;
    E *key_panels, *value_panels, *key_rows;  // of a block of keys
    BackwardScores<T> scores;
    E *weight_columns, *grad_columns, *grad_rows;  // of a block, as products take them; the same again

    FASTLM_NOINLINE static Buffers take(Workspace& workspace, const AttentionBackwardParams<S>& p, int64_t most_keys) {
      const int64_t q_stride = row_stride<T>(p.dim), v_stride = row_stride<T>(p.v_dim);
      const int64_t block = kBackwardQueries * BackwardScores<T>::kStride;
      const int64_t q_len = even_up(p.q_len);
      Buffers b{};
      b.queries = workspace.take<E>(q_len * row_stride<E>(p.dim));
      b.grads = workspace.take<E>(q_len * row_stride<E>(p.v_dim));
      b.query_panels = kPairs<E> ? workspace.take<E>(blocks(p.q_len) * kBackwardQueries * q_stride) : b.queries;
      b.grad_panels = kPairs<E> ? workspace.take<E>(blocks(p.q_len) * kBackwardQueries * v_stride) : b.grads;
      b.grad_q = workspace.take<T>(p.q_len * q_stride);
      b.grad_k = workspace.take<T>(most_keys * q_stride);
      b.grad_v = workspace.take<T>(most_keys * v_stride);
      b.key_panels = workspace.take<E>(kBackwardKeys * panel_depth<E>(p.dim));
      b.value_panels = workspace.take<E>(kBackwardKeys * panel_depth<E>(p.v_dim));
      b.key_rows = workspace.take<E>(kBackwardKeys * q_stride);
      b.scores = BackwardScores<T>::take(workspace);
      if constexpr (kPairs<E>) {
        b.weight_columns = workspace.take<E>(block);
        b.grad_columns = workspace.take<E>(block);
        b.grad_rows = workspace.take<E>(block);
      } else {
        b.weight_columns = b.scores.weights, b.grad_columns = b.grad_rows = b.scores.gradients;
      }
      return b;
    }
  };

  BackwardProducts(const AttentionBackwardParams<S>& p, int64_t, const Buffers& buffers)
      : p_(p),
        buffers_(buffers),
        q_stride_(row_stride<T>(p.dim)),
        v_stride_(row_stride<T>(p.v_dim)),
        q_rows_stride_(row_stride<E>(p.dim)),
        v_rows_stride_(row_stride<E>(p.v_dim)) {}

  // Queries at once: all.
  static int64_t span(const AttentionBackwardParams<S>& p) { return std::max<int64_t>(1, p.q_len); }
  // Of n queries, and tiles of these: of equal sizes.
  static int64_t blocks(int64_t n) { return (n + kBackwardQueries - 1) / kBackwardQueries; }
  static Team::Range block(int64_t i, int64_t n) { return {n * i / blocks(n), n * (i + 1) / blocks(n)}; }
  static int64_t tiles(Team::Range block) { return (block.end - block.begin + kRows - 1) / kRows; }
  static Team::Range tile(Team::Range block, int64_t t) {
    const int64_t n = block.end - block.begin, count = tiles(block);
    return {block.begin + n * t / count, block.begin + n * (t + 1) / count};
  }

  void start_keys(int64_t keys) {
    std::fill_n(buffers_.grad_k, keys * q_stride_, T(0));
    std::fill_n(buffers_.grad_v, keys * v_stride_, T(0));
  }
  // Columns [d, d + width) of dK and dV of each key: all at once.
  template <class WriteK, class WriteV>
  void each_key(int64_t keys, const WriteK& write_k, const WriteV& write_v) {
    for (int64_t n = 0; n < keys; ++n) {
      write_k(n, 0, p_.dim, buffers_.grad_k + n * q_stride_);
      write_v(n, 0, p_.v_dim, buffers_.grad_v + n * v_stride_);
    }
  }

  // n rows of both; dQ begins with zeros.
  void load_queries(const S* q, const S* grad, int64_t n) {
    copy_rows(q, p_.q.time, n, p_.dim, buffers_.queries, q_rows_stride_);
    copy_rows(grad, p_.grad_output.time, n, p_.v_dim, buffers_.grads, v_rows_stride_);
    for (int64_t i = 0; kPairs<E> && i < blocks(n); ++i) {
      const auto [begin, end] = block(i, n);
      const int64_t place = i * kBackwardQueries;
      pack_panel(q + begin * p_.q.time, p_.q.time, end - begin, p_.dim, buffers_.query_panels + place * q_stride_,
                 q_stride_);
      pack_panel(grad + begin * p_.grad_output.time, p_.grad_output.time, end - begin, p_.v_dim,
                 buffers_.grad_panels + place * v_stride_, v_stride_);
    }
    std::fill_n(buffers_.grad_q, n * q_stride_, T(0));
  }
  const T* grad_q(int64_t i) const { return buffers_.grad_q + i * q_stride_; }

  // Of a block.
  void pack_keys(const S* k, const S* v, int64_t keys) {
    fastlm::cpu::FASTLM_ISA_NAMESPACE::pack_keys(k, p_.k.time, 0, keys, p_.dim, buffers_.key_panels);
    fastlm::cpu::FASTLM_ISA_NAMESPACE::pack_keys(v, p_.v.time, 0, keys, p_.v_dim, buffers_.value_panels);
    panel_width_ = panel_width<T>(keys);
    pack_panel(k, p_.k.time, keys, p_.dim, buffers_.key_rows, q_stride_);
  }

  BackwardScores<T> scores(Team::Range block, Team::Range tile) const { return buffers_.scores.from(block, tile); }

  // Of a tile, in whole vectors: products of its queries with keys, and of their gradients with values.
  void multiply_keys(Team::Range block, Team::Range tile, Keys keys) {
    multiply_tile(tile, keys, p_.dim, buffers_.queries, q_rows_stride_, buffers_.key_panels,
                  scores(block, tile).weights);
  }
  void multiply_values(Team::Range block, Team::Range tile, Keys keys) {
    multiply_tile(tile, keys, p_.v_dim, buffers_.grads, v_rows_stride_, buffers_.value_panels,
                  scores(block, tile).gradients);
  }

  // A tile that sees nothing.
  void clear_tile(Team::Range block, Team::Range tile) {
    const auto [weights, gradients] = scores(block, tile);
    for (T* to : {weights, gradients}) std::fill_n(to, (tile.end - tile.begin) * s_stride_, T(0));
  }

  // Weights and gradients of scores of a tile are known.
  void keep_scores(Team::Range block, Team::Range tile) {
    const int64_t place = (tile.begin - block.begin) * s_stride_;
    if constexpr (kPairs<E>)
      for (int64_t r = place; r < place + (tile.end - tile.begin) * s_stride_; r += s_stride_)
        round_row(buffers_.scores.gradients + r, buffers_.grad_rows + r);
  }

  // A tile's part of dQ.
  void add_to_queries(Team::Range block, Team::Range tile, Keys keys) {
    const int64_t place = (tile.begin - block.begin) * s_stride_, from = lanes_down<T>(keys.begin);
    multiply<false>(tile.end - tile.begin, keys.end - from, p_.dim,
                    PanelProduct<E>{buffers_.grad_rows + place + from, s_stride_, buffers_.key_rows + from * q_stride_,
                                    kPairing<E> * q_stride_, kPairing<E> * kCols<T>,
                                    buffers_.grad_q + tile.begin * q_stride_, q_stride_},
                    true);
  }

  // The part of block i, of these queries, of dK and dV of the item's keys from `first` on, for tiles of them, over the
  // queries that see some; `seen`: what each does.
  void add_to_keys(int64_t i, Team::Range queries, int64_t first, int64_t keys, const Keys* seen) {
#ifdef FASTLM_BFLOAT16_TILES
    static_assert(kBackwardQueries <= kColumnDepth);
#endif
    if constexpr (kPairs<E>) make_columns(queries);
    const int64_t rows = queries.end - queries.begin, count = (keys + kRows - 1) / kRows;
    const int64_t place = kPairs<E> ? i * kBackwardQueries : queries.begin;  // of the block's first in the panels
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = keys * t / count, end = keys * (t + 1) / count, key = first + n;
      const auto sees = [&](int64_t r) { return seen[r].begin < end && seen[r].end > n; };
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

 private:
  void multiply_tile(Team::Range tile, Keys keys, int64_t dim, const E* rows, int64_t stride, const E* panels, T* to) {
    const int64_t panel = keys.begin / kCols<T> * kCols<T>, depth = panel_depth<E>(dim);
    multiply<false>(tile.end - tile.begin, dim, lanes_up<T>(keys.end) - panel,
                    PanelProduct<E>{rows + tile.begin * stride, stride, panels + panel * depth,
                                    kPairing<E> * panel_width_, kCols<T> * depth, to + panel, s_stride_},
                    false);
  }

  // A row of a block's matrix as an operand.
  static void round_row(const T* from, BFloat16* to) {
    for (int64_t i = 0; i < kBackwardKeys; i += V::kLanes) store_operand(V::load(from + i), to + i);
  }

  // Both matrices of a block with their rows in pairs.
  void make_columns(Team::Range block) {
    const int64_t rows = block.end - block.begin;
    for (const auto& [from, to] : {std::pair{buffers_.scores.weights, buffers_.weight_columns},
                                   std::pair{buffers_.scores.gradients, buffers_.grad_columns}})
      for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < kBackwardKeys; i += V::kLanes) {
          const T* row = from + r * s_stride_ + i;
          const FloatBits words = pair_lanes(operand_bits(V::load(row)),
                                             r + 1 < rows ? operand_bits(V::load(row + s_stride_)) : FloatBits{});
          memcpy(to + r * s_stride_ + 2 * i, &words, sizeof(words));
        }
  }

  const AttentionBackwardParams<S>& p_;
  const Buffers buffers_;
  static constexpr int64_t s_stride_ = BackwardScores<T>::kStride;
  const int64_t q_stride_, v_stride_;
  const int64_t q_rows_stride_, v_rows_stride_;  // of the operands' rows
  int64_t panel_width_ = 0;
};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
