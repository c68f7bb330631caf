// The one product of fastlm: C = init + op(A) op(B), blocked and packed, float and double.
//
// B is packed into panels of kCols columns, [K][kCols] each; A is read in place where its rows are contiguous in k, and
// packed [K][kTileRows] where they are not. A tile of up to kTileRows x kCols of C lives in registers over a block of
// K (tile.h), so B's panel comes from L1 or L2. Few rows against weights as a layer stores them skip packing (dot.inl).
#pragma once

#include <algorithm>

#include "core/params.h"
#include "cpu/kernels/dot.inl"
#include "cpu/kernels/tile.h"
#include "cpu/team.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Panel [depth][kCols] of columns [0, cols) of B as stored (K, N): rows copied, missing columns zero.
template <class T>
void pack_rows(const T* b, int64_t stride, int64_t depth, int64_t cols, T* panel) {
  using V = Vec<T>;
  for (int64_t k = 0; k < depth; ++k, b += stride, panel += kCols<T>)
    for (int v = 0; v < kTileVecs; ++v)
      V::load_partial(b + v * V::kLanes, std::clamp<int64_t>(cols - v * V::kLanes, 0, V::kLanes))
          .store(panel + v * V::kLanes);
}

// The same panel of B as stored (N, K): transposed.
template <class T>
void pack_transposed(const T* b, int64_t stride, int64_t depth, int64_t cols, T* panel) {
  int64_t n = 0;
#if FASTLM_FMA_BYTES >= 32
  if constexpr (sizeof(T) == 4)
    for (; n + 8 <= cols; n += 8) {
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8) transpose_8x8(b + n * stride + k, stride, panel + k * kCols<T> + n, kCols<T>);
      for (; k < depth; ++k)
        for (int i = 0; i < 8; ++i) panel[k * kCols<T> + n + i] = b[(n + i) * stride + k];
    }
#endif
  for (; n < kCols<T>; ++n)
    for (int64_t k = 0; k < depth; ++k) panel[k * kCols<T> + n] = n < cols ? b[n * stride + k] : T(0);
}

// Rows [begin, end) of A as stored (K, M), packed [tile][depth][kTileRows]. Some tiles at once, since rows of A lie
// pages apart: every line of them is then touched once.
template <class T>
void pack_tiles(const T* a, int64_t stride, int64_t depth, int64_t begin, int64_t end, T* packed) {
  constexpr int64_t kTogether = 8;
  int64_t m = begin;
  for (; m + kTogether * kTileRows <= end; m += kTogether * kTileRows, packed += kTogether * depth * kTileRows)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < kTogether; ++i)
        memcpy(packed + (i * depth + k) * kTileRows, a + k * stride + m + i * kTileRows, kTileRows * sizeof(T));
  for (; m < end; m += kTileRows, packed += depth * kTileRows)
    for (int64_t k = 0; k < depth; ++k)
      memcpy(packed + k * kTileRows, a + k * stride + m, std::min<int64_t>(kTileRows, end - m) * sizeof(T));
}

template <class T>
struct GemmBuffers {
  T* b_panels;  // shared: one block of k of all panels
  T* a_tiles;   // kBlockRows x kBlockDepth per member
  T* edge;      // kTileRows x kCols per member

  template <class W>
  static GemmBuffers take(W& workspace, int64_t n, int64_t k, int members) {
    const int64_t panels = (n + kCols<T> - 1) / kCols<T>;
    GemmBuffers buffers;
    buffers.b_panels = workspace.template take<T>(panels * std::min(k, kBlockDepth<T>) * kCols<T>);
    buffers.a_tiles = workspace.template take<T>(members * kBlockRows * kBlockDepth<T>);
    buffers.edge = workspace.template take<T>(members * kTileRows * kCols<T>);
    return buffers;
  }
};

// One block of k of one panel of C: rows [begin, end), at most kBlockRows.
template <class T>
void block_times_panel(const GemmParams<T>& p, const T* a_tiles, int64_t begin, int64_t end, int64_t k, int64_t depth,
                       const T* panel, int64_t col, T* edge) {
  const int64_t cols = std::min(kCols<T>, p.n - col);
  const Init init = k > 0 || p.accumulate ? Init::kAccumulate : Init::kZero;
  const int deal = accumulators(p.m);
  const int64_t limit = p.a_transposed || deal == 1 ? kTileRows : deal == 2 ? 3 : 1;
  for (int64_t m = begin; m < end; m += limit) {
    const int rows = static_cast<int>(std::min(limit, end - m));
    T* c = p.c + m * p.c_stride + col;
    const bool whole = cols == kCols<T>;
    TileParams<T> tile{nullptr,
                       p.a_stride,
                       panel,
                       kCols<T>,
                       depth,
                       whole ? c : edge,
                       whole ? p.c_stride : kCols<T>,
                       whole ? init : Init::kZero,
                       nullptr,
                       fetch_ahead(panel, kCols<T>, depth, (m - begin) / limit)};
    if (p.a_transposed) {
      tile.a = a_tiles + (m - begin) * depth;
      run_tile<T, true>(rows, 1, tile);
    } else {
      tile.a = p.a + m * p.a_stride + k;
      run_tile<T, false>(rows, deal, tile);
    }
    if (whole) continue;
    for (int r = 0; r < rows; ++r)
      for (int64_t j = 0; j < cols; ++j)
        c[r * p.c_stride + j] = edge[r * kCols<T> + j] + (init == Init::kAccumulate ? c[r * p.c_stride + j] : T(0));
  }
}

// Up to this many rows, packing B costs more than it gives.
constexpr int64_t kDirectRows = 48;

// Run by every member. Ends without a barrier: whoever reads C from another member's part waits first.
template <class T>
void gemm(const GemmParams<T>& p, const GemmBuffers<T>& buffers, const Team& team) {
  if (p.b_transposed && !p.a_transposed && p.m <= kDirectRows) {
    const auto own = team.split(p.n, 8);
    return dot_product<T>({p.a, p.a_stride, p.b + own.begin * p.b_stride, p.b_stride, own.end - own.begin, p.k,
                           p.c + own.begin, p.c_stride, p.accumulate ? Init::kAccumulate : Init::kZero, nullptr},
                          p.m);
  }
  if (p.k == 0 && !p.accumulate) {
    const auto own = team.split(p.m);
    for (int64_t m = own.begin; m < own.end; ++m) std::fill_n(p.c + m * p.c_stride, p.n, T(0));
    return;
  }
  const int64_t panels = (p.n + kCols<T> - 1) / kCols<T>;
  const bool split_rows = p.m >= 2 * kTileRows * team.size && (p.m >= p.n || panels < 2 * team.size);
  const auto rows = split_rows ? team.split(p.m, kTileRows) : Team::Range{0, p.m};
  const auto own = split_rows ? Team::Range{0, panels} : team.split(panels);
  const auto to_pack = team.split(panels);
  T* a_tiles = buffers.a_tiles + team.rank * kBlockRows * kBlockDepth<T>;
  T* edge = buffers.edge + team.rank * kTileRows * kCols<T>;
  for (int64_t k = 0; k < p.k; k += kBlockDepth<T>) {
    const int64_t depth = std::min(kBlockDepth<T>, p.k - k);
    if (k > 0) team.barrier();
    for (int64_t i = to_pack.begin; i < to_pack.end; ++i) {
      const int64_t col = i * kCols<T>, cols = std::min(kCols<T>, p.n - col);
      T* panel = buffers.b_panels + i * depth * kCols<T>;
      if (p.b_transposed)
        pack_transposed(p.b + col * p.b_stride + k, p.b_stride, depth, cols, panel);
      else
        pack_rows(p.b + k * p.b_stride + col, p.b_stride, depth, cols, panel);
    }
    team.barrier();
    for (int64_t m = rows.begin; m < rows.end; m += kBlockRows) {
      const int64_t end = std::min(rows.end, m + kBlockRows);
      if (p.a_transposed) pack_tiles(p.a + k * p.a_stride, p.a_stride, depth, m, end, a_tiles);
      for (int64_t i = own.begin; i < own.end; ++i)
        block_times_panel(p, a_tiles, m, end, k, depth, buffers.b_panels + i * depth * kCols<T>, i * kCols<T>, edge);
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
