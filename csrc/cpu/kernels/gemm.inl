// The one product of fastlm: C = init + op(A) op(B), blocked and packed, float and double.
//
// B is packed into panels of kCols columns, [K][kCols] each; A is read in place where its rows are contiguous in k, and
// packed [K][kTileRows] where they are not. A tile of up to kTileRows x kCols of C lives in registers over a block of
// K (tile.h), so B's panel comes from L1 or L2. Few rows against weights as a layer stores them skip packing (dot.inl,
// broadcast.inl).
#pragma once

#include <algorithm>

#include "core/params.h"
#include "cpu/kernels/broadcast.inl"
#include "cpu/kernels/dot.inl"
#include "cpu/kernels/tile.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Packing reads columns of a matrix: a piece of each row, and rows lie pages apart, where no prefetcher follows. So
// pieces are called for some rows ahead.
constexpr int64_t kRowsAhead = 8;

// Panel [depth][kCols] of columns [0, cols) of B as stored (K, N): rows copied, missing columns zero.
template <class S, class T>
void pack_rows(const S* b, int64_t stride, int64_t depth, int64_t cols, T* panel) {
  using V = Vec<T>;
  for (int64_t k = 0; k < depth; ++k, b += stride, panel += kCols<T>) {
    for (int64_t i = 0; i < kCols<T>; i += 64 / sizeof(S)) __builtin_prefetch(b + kRowsAhead * stride + i);
    for (int v = 0; v < kTileVecs; ++v)
      load_as<V>(b + v * V::kLanes, std::clamp<int64_t>(cols - v * V::kLanes, 0, V::kLanes))
          .store(panel + v * V::kLanes);
  }
}

// The same panel of B as stored (N, K), transposed; of `width` columns, whole vectors, where there are no more in all.
template <class S, class T>
void pack_transposed(const S* b, int64_t stride, int64_t depth, int64_t cols, T* panel, int64_t width = kCols<T>) {
  int64_t n = 0;
#if FASTLM_FMA_BYTES >= 32
  if constexpr (sizeof(T) == 4)
    for (; n < width; n += 8) {
      const int64_t rows = std::clamp<int64_t>(cols - n, 0, 8);
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8) transpose_8x8(b + n * stride + k, stride, panel + k * width + n, width, rows);
      for (; k < depth; ++k)
        for (int i = 0; i < 8; ++i) panel[k * width + n + i] = i < rows ? widen(b[(n + i) * stride + k]) : T(0);
    }
#endif
  for (; n < cols; ++n)
    for (int64_t k = 0; k < depth; ++k) panel[k * width + n] = widen(b[n * stride + k]);
  for (int64_t k = 0; n < width && k < depth; ++k) std::fill_n(panel + k * width + n, width - n, T(0));
}

#define FASTLM_SHARED_PACKING(keyword)                                                               \
  keyword template void pack_transposed(const float*, int64_t, int64_t, int64_t, float*, int64_t);   \
  keyword template void pack_transposed(const double*, int64_t, int64_t, int64_t, double*, int64_t); \
  keyword template void pack_transposed(const BFloat16*, int64_t, int64_t, int64_t, float*, int64_t)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_PACKING(extern);
#endif

// As a panel of pairs along k, [depth / 2][width][2]: pairs are words of four bytes.
inline void pack_transposed(const BFloat16* b, int64_t stride, int64_t depth, int64_t cols, BFloat16* panel,
                            int64_t width = kCols<float>) {
  for (int64_t n = 0; n < width; n += 8) {
    const int64_t rows = std::clamp<int64_t>(cols - n, 0, 8);
    int64_t k = 0;
#if FASTLM_FMA_BYTES >= 32
    if (stride % 2 == 0)
      for (; k + 16 <= depth; k += 16)
        transpose_8x8(reinterpret_cast<const float*>(b + n * stride + k), stride / 2,
                      reinterpret_cast<float*>(panel + k * width + 2 * n), width, rows);
#endif
    for (; k < depth; k += 2)
      for (int64_t i = 0; i < 8; ++i) {
        BFloat16 pair[2] = {};
        if (i < rows) std::copy_n(b + (n + i) * stride + k, std::min<int64_t>(2, depth - k), pair);
        std::copy_n(pair, 2, panel + k * width + 2 * (n + i));
      }
  }
}

// Rows [begin, end) of A as stored (K, M), packed [tile][depth][kTileRows]. Some tiles at once, since rows of A lie
// pages apart: every line of them is then touched once.
template <class T>
void pack_tiles(const T* a, int64_t stride, int64_t depth, int64_t begin, int64_t end, T* packed) {
  constexpr int64_t kTogether = 8;
  int64_t m = begin;
  for (; m + kTogether * kTileRows <= end; m += kTogether * kTileRows, packed += kTogether * depth * kTileRows)
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = a + k * stride + m;
      for (int64_t i = 0; i < kTogether * kTileRows; i += 64 / sizeof(T))
        __builtin_prefetch(row + kRowsAhead * stride + i);
      for (int64_t i = 0; i < kTogether; ++i)
        memcpy(packed + (i * depth + k) * kTileRows, row + i * kTileRows, kTileRows * sizeof(T));
    }
  for (; m + kTileRows <= end; m += kTileRows, packed += depth * kTileRows)
    for (int64_t k = 0; k < depth; ++k) memcpy(packed + k * kTileRows, a + k * stride + m, kTileRows * sizeof(T));
  for (int64_t k = 0; m < end && k < depth; ++k) std::copy_n(a + k * stride + m, end - m, packed + k * kTileRows);
}

template <class T>
constexpr int64_t panels_for(int64_t cols) {
  return (cols + kCols<T> - 1) / kCols<T>;
}

// A panel of C takes in the blocks of kDeep one after another, from cache, before the next panel comes: C itself would
// have to come from memory for each. The fewer rows of A at a time keep these in L2.
constexpr int64_t kDeepRows = kBlockRows / 2;

template <class T>
struct GemmBuffers {
  T* b_panels;  // shared: kDeep of k of all panels
  T* a_tiles;   // kDeepRows x kDeep or kBlockRows x kBlockDepth per member
  T* edge;      // kTileRows x kCols per member

  static GemmBuffers take(Workspace& workspace, int64_t panels, int64_t k, int members) {
    GemmBuffers buffers;
    buffers.b_panels = workspace.take<T>(panels * std::min(k, kDeep<T>) * kCols<T>);
    buffers.a_tiles = workspace.take<T>(members * kDeepRows * kDeep<T>);
    buffers.edge = workspace.take<T>(members * kTileRows * kCols<T>);
    return buffers;
  }
};

// What C starts from.
template <class T>
Init first_init(const GemmParams<T>& p) {
  return p.accumulate ? Init::kAccumulate : p.bias ? Init::kBias : Init::kZero;
}

// One block of k of one panel of C: rows [begin, end), at most kBlockRows.
template <class T>
void block_times_panel(const GemmParams<T>& p, const T* a_tiles, int64_t begin, int64_t end, int64_t k, int64_t depth,
                       const T* panel, int64_t col, T* edge) {
  const int64_t cols = std::min(kCols<T>, p.n - col);
  const Init init = k > 0 ? Init::kAccumulate : first_init(p);
  const T* bias = p.bias ? p.bias + col : nullptr;
  const int deal = accumulators(p.m);
  const int64_t limit = p.a_transposed || deal == 1 ? kTileRows : deal == 2 ? 3 : 1;
  for (int64_t m = begin; m < end; m += limit) {
    const int rows = static_cast<int>(std::min(limit, end - m));
    T* c = p.c + m * p.c_stride + col;
    // Written in place: whole vectors, and all of them where k is dealt.
    const bool whole = cols == kCols<T> || (deal == 1 && cols % Vec<T>::kLanes == 0);
    TileParams<T> tile{nullptr,
                       p.a_stride,
                       panel,
                       kCols<T>,
                       depth,
                       whole ? c : edge,
                       whole ? p.c_stride : kCols<T>,
                       whole ? init : Init::kZero,
                       bias,
                       fetch_ahead<T>(panel, panel + depth * kCols<T>, depth, (m - begin) / limit)};
    if (p.a_transposed) {
      tile.a = a_tiles + (m - begin) * depth;
      tile.a_row = kTileRows;
      run_tile_of<true>(rows, cols, 1, tile);
    } else {
      tile.a = p.a + m * p.a_stride + k;
      run_tile_of<false>(rows, cols, deal, tile);
    }
    if (whole) continue;
    for (int r = 0; r < rows; ++r, c += p.c_stride) {
      const T* start = init == Init::kAccumulate ? c : bias;
      for (int64_t j = 0; j < cols; ++j) c[j] = edge[r * kCols<T> + j] + (start ? start[j] : T(0));
    }
  }
}

// Up to this depth a tile's arithmetic is no longer than the writing of C, which then goes row by row.
constexpr int64_t kShallow = 64;

// One or two products C = op(A) op(B) that share A (m, k and all that is said of A), each with its own B and C.
template <class T>
struct Products {
  const GemmParams<T>* parts;
  int count;

  int64_t panels() const { return panels_for<T>(parts[0].n) + (count > 1 ? panels_for<T>(parts[1].n) : 0); }
  struct Panel {
    const GemmParams<T>& p;
    int64_t col, cols;
  };
  Panel panel(int64_t i) const {
    const int64_t first = panels_for<T>(parts[0].n);
    const bool second = i >= first;
    const int64_t col = (second ? i - first : i) * kCols<T>;
    return {parts[second], col, std::min(kCols<T>, parts[second].n - col)};
  }
};

// Panel i of B for k to k + depth; of T or what stands for it in products.
template <class T, class P>
void pack_panel(const Products<T>& products, int64_t i, int64_t k, int64_t depth, P* to) {
  const auto [p, col, cols] = products.panel(i);
  if (p.b_transposed)
    pack_transposed(p.b + col * p.b_stride + k, p.b_stride, depth, cols, to, kCols<T>);
  else
    pack_rows(p.b + k * p.b_stride + col, p.b_stride, depth, cols, to);
}

// Rows [begin, end) of panels `own` of C over k to k + depth, at most kDeep.
template <class T>
void block_times_panels(const Products<T>& products, int64_t begin, int64_t end, Team::Range own, int64_t k,
                        int64_t depth, const T* b_panels, T* a_tiles, T* edge) {
  const auto& p = products.parts[0];
  const int64_t tile_rows = (end - begin + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t j = 0; p.a_transposed && j < depth; j += kBlockDepth<T>)
    pack_tiles(p.a + (k + j) * p.a_stride, p.a_stride, std::min(kBlockDepth<T>, depth - j), begin, end,
               a_tiles + j * tile_rows);
  const int64_t together = depth <= kShallow ? kTileRows : end - begin;
  for (int64_t m = begin; m < end; m += together)
    for (int64_t i = own.begin; i < own.end; ++i)
      for (int64_t j = 0; j < depth; j += kBlockDepth<T>) {
        const auto panel = products.panel(i);
        const int64_t block = std::min(kBlockDepth<T>, depth - j);
        block_times_panel<T>(panel.p, a_tiles + j * tile_rows + (m - begin) * block, m, std::min(end, m + together),
                             k + j, block, b_panels + (i * depth + j) * kCols<T>, panel.col, edge);
      }
}

// The product of no depth.
template <class T>
void start_rows(const GemmParams<T>& p, const Team& team) {
  const auto own = team.split(p.m);
  for (int64_t m = own.begin; m < own.end; ++m)
    if (p.bias)
      std::copy_n(p.bias, p.n, p.c + m * p.c_stride);
    else
      std::fill_n(p.c + m * p.c_stride, p.n, T(0));
}

// Run by every member. Ends without a barrier: whoever reads C from another member's part waits first.
template <class T>
void gemm(const Products<T>& products, const GemmBuffers<T>& buffers, const Team& team) {
  const auto& p = products.parts[0];
  for (int i = 0; p.k == 0 && i < products.count; ++i)
    if (!products.parts[i].accumulate) start_rows(products.parts[i], team);
  const int64_t panels = products.panels();
  const bool split_rows = p.m >= 2 * kTileRows * team.size && (p.m >= panels * kCols<T> || panels < 2 * team.size);
  // Items of equal size, as many for each member.
  const int64_t most = p.k > kBlockDepth<T> ? kDeepRows : kBlockRows;
  const int64_t rounds = std::max<int64_t>(1, (p.m + team.size * most - 1) / (team.size * most));
  const int64_t share = (p.m + team.size * rounds - 1) / (team.size * rounds);
  const int64_t item_rows = split_rows ? (share + kTileRows - 1) / kTileRows * kTileRows : most;
  T* a_tiles = buffers.a_tiles + team.rank * kDeepRows * kDeep<T>;
  T* edge = buffers.edge + team.rank * kTileRows * kCols<T>;
  for (int64_t k = 0; k < p.k; k += kDeep<T>) {
    const int64_t depth = std::min(kDeep<T>, p.k - k);
    if (k > 0) team.barrier();
    team.share(panels, false,
               [&](int64_t i) { pack_panel(products, i, k, depth, buffers.b_panels + i * depth * kCols<T>); });
    team.barrier();
    const auto rows_times = [&](int64_t m, Team::Range own) {
      block_times_panels(products, m, std::min(p.m, m + item_rows), own, k, depth,
                         static_cast<const T*>(buffers.b_panels), a_tiles, edge);
    };
    if (split_rows)
      team.share((p.m + item_rows - 1) / item_rows, false, [&](int64_t i) { rows_times(i * item_rows, {0, panels}); });
    else
      for (int64_t m = 0; m < p.m; m += item_rows) rows_times(m, team.split(panels));
  }
}

#define FASTLM_SHARED_GEMM(keyword)                                                           \
  keyword template void gemm(const Products<float>&, const GemmBuffers<float>&, const Team&); \
  keyword template void gemm(const Products<double>&, const GemmBuffers<double>&, const Team&)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_GEMM(extern);
#endif

// C = A W^T (W as a layer stores it) for few rows needs no packing of W.
template <class T>
bool reads_weights_in_place(const GemmParams<T>& p) {
  return p.b_transposed && !p.a_transposed && p.m <= kBroadcastRowsAtMost;
}

// The rest of what such a product needs.
template <class T>
struct FewRowsBuffers {
  T* panels;  // of A's rows; shared
  T* sums;    // per member, of one panel of C

  static FewRowsBuffers take(Workspace& workspace, const GemmParams<T>& p, int members) {
    const int64_t padded = RowGroups::of<T>(p.m).padded;
    FewRowsBuffers buffers;
    buffers.panels = workspace.take<T>(padded * p.k);
    buffers.sums = workspace.take<T>(members * padded * kCols<T>);
    return buffers;
  }
};

template <class T>
void gemm_few_rows(const GemmParams<T>& p, const FewRowsBuffers<T>& buffers, const Team& team) {
  if (dot_is_faster<T>(p.m, p.k)) {
    const auto own = team.split(p.n, 8);
    return dot_product<T>({p.a, p.a_stride, p.b + own.begin * p.b_stride, p.b_stride, own.end - own.begin, p.k,
                           p.c + own.begin, p.c_stride, first_init(p), p.bias ? p.bias + own.begin : nullptr,
                           dot_rows_ahead(p.n * p.k * static_cast<int64_t>(sizeof(T)))},
                          p.m);
  }
  const auto groups = RowGroups::of<T>(p.m);
  const auto columns = team.split(p.k, kLine<T>);
  turn_rows(groups, p.a, p.a_stride, p.k, columns.begin, columns.end, buffers.panels);
  team.barrier();
  team.share(panels_for<T>(p.n), false, [&](int64_t i) {
    const int64_t col = i * kCols<T>;
    broadcast_product<T>(groups, {buffers.panels, p.b + col * p.b_stride, p.b_stride, std::min(kCols<T>, p.n - col),
                                  p.k, p.c + col, p.c_stride, first_init(p), p.bias ? p.bias + col : nullptr,
                                  buffers.sums + team.rank * groups.padded * kCols<T>});
  });
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
