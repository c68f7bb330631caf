// The product of gemm.inl for floats that are split: blocks of rows of A stay in L2 while panel after panel of B
// passes.
#pragma once

#include "cpu/kernels/operands.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int64_t kSplitRows = 128;  // of A, split at once
constexpr int64_t kSplitDepth = kDeep<float>;

struct SplitGemmBuffers {
  SplitFloat* b_panels;  // shared: kSplitDepth of k of all panels
  SplitFloat* a;         // kSplitRows x kSplitDepth per member
  float* edge;           // kSplitRows x kCols per member

  static SplitGemmBuffers take(Workspace& workspace, int64_t panels, int64_t k, int members) {
    SplitGemmBuffers buffers;
    const int64_t depth = panel_depth<SplitFloat>(std::min(k, kSplitDepth));
    buffers.b_panels = workspace.take<SplitFloat>(panels * depth * kCols<float>);
    buffers.a = workspace.take<SplitFloat>(members * kSplitRows * row_stride<SplitFloat>(depth));
    buffers.edge = workspace.take<float>(members * kSplitRows * kCols<float>);
    return buffers;
  }
};

// Columns of A as stored (K, M) as rows of operands. Sixteen columns of a group of k at once: every line of them is
// touched once.
inline void split_columns(const float* a, int64_t stride, int64_t depth, int64_t rows, SplitFloat* to,
                          int64_t to_stride) {
  constexpr int64_t kSide = 16;
  alignas(64) float turned[kSide * kSplitColumns];
  for (int64_t k = 0; k < depth; k += kSplitColumns)
    for (int64_t m = 0; m < rows; m += kSide) {
      const int64_t count = std::min(kSide, rows - m), deep = std::min(kSplitColumns, depth - k);
      const float* from = a + k * stride + m;
      for (int64_t i = 0; i < kSplitColumns && m + kSide < rows; ++i) __builtin_prefetch(from + i * stride + kSide);
      for (int64_t i = 0; i < deep; i += 8)
        for (int64_t j = 0; j < count; j += 8)
          if (i + 8 <= deep && j + 8 <= count)
            transpose_8x8(from + i * stride + j, stride, turned + j * kSplitColumns + i, kSplitColumns);
          else
            for (int64_t x = i; x < std::min(deep, i + 8); ++x)
              for (int64_t y = j; y < std::min(count, j + 8); ++y) turned[y * kSplitColumns + x] = from[x * stride + y];
      copy_rows(turned, kSplitColumns, count, deep, to + m * to_stride + k, to_stride);
    }
}

// Rows [0, rows) of A, split, times one panel of B over `depth` from k on; row 0 is C's row m.
inline void split_rows_times_panel(const GemmParams<float>& p, const SplitFloat* a, int64_t a_stride, int64_t m,
                                   int64_t rows, int64_t k, int64_t depth, const SplitFloat* panel, int64_t col,
                                   float* edge) {
  const int64_t cols = std::min(kCols<float>, p.n - col);
  const Init init = k > 0 ? Init::kAccumulate : first_init(p);
  float* c = p.c + m * p.c_stride + col;
  const bool whole = cols % kTileSide == 0;
  split_rows_times_panel(a, a_stride, rows, panel, pair_step(depth), cols, depth, whole ? c : edge,
                         whole ? p.c_stride : kCols<float>, whole ? init : Init::kZero,
                         p.bias ? p.bias + col : nullptr);
  for (int64_t i = 0; !whole && i < rows; ++i, c += p.c_stride, edge += kCols<float>)
    for (int64_t j = 0; j < cols; ++j)
      c[j] = edge[j] + (init == Init::kAccumulate ? c[j] : init == Init::kBias ? p.bias[col + j] : 0.f);
}

// Rows of A, and which of each product's C they become the rows of; -1: none.
struct RowRange {
  int64_t begin, rows, to[2];
};

// Run by every member; as gemm() of floats that are not split, for some ranges of rows of A.
template <size_t N>
void gemm(const Products<float>& products, const std::array<RowRange, N>& ranges, const SplitGemmBuffers& buffers,
          const Team& team) {
  const auto& p = products.parts[0];
  const int64_t panels = products.panels(), first = panels_for<float>(products.parts[0].n);
  const int64_t a_stride = row_stride<SplitFloat>(panel_depth<SplitFloat>(std::min(p.k, kSplitDepth)));
  SplitFloat* a = buffers.a + team.rank * kSplitRows * a_stride;
  float* edge = buffers.edge + team.rank * kSplitRows * kCols<float>;
  int64_t all = 0, items = 0;
  for (const auto& range : ranges) all += range.rows;
  // Items of equal size, as many for each member.
  const bool shares_rows = all >= kTilesRows * team.size;
  const int64_t rounds = std::max<int64_t>(1, (all + team.size * kSplitRows - 1) / (team.size * kSplitRows));
  const int64_t share = (all + team.size * rounds - 1) / (team.size * rounds);
  const int64_t item_rows =
      shares_rows ? std::min(kSplitRows, (share + kTileSide - 1) / kTileSide * kTileSide) : kSplitRows;
  for (const auto& range : ranges) items += (range.rows + item_rows - 1) / item_rows;
  for (int64_t k = 0; k < p.k; k += kSplitDepth) {
    const int64_t depth = std::min(kSplitDepth, p.k - k), size = panel_depth<SplitFloat>(depth) * kCols<float>;
    if (k > 0) team.barrier();
    team.share(panels, false, [&](int64_t i) { pack_panel(products, i, k, depth, buffers.b_panels + i * size); });
    team.barrier();
    const auto item_times = [&](int64_t item, Team::Range own) {
      const RowRange* range = ranges.data();
      for (int64_t own_items; item >= (own_items = (range->rows + item_rows - 1) / item_rows); ++range)
        item -= own_items;
      const int64_t row = item * item_rows, rows = std::min(item_rows, range->rows - row), m = range->begin + row;
      if (p.a_transposed)
        split_columns(p.a + k * p.a_stride + m, p.a_stride, depth, rows, a, a_stride);
      else
        copy_rows(p.a + m * p.a_stride + k, p.a_stride, rows, depth, a, a_stride);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const auto panel = products.panel(i);
        const int64_t to = range->to[i < first ? 0 : 1];
        if (to >= 0)
          split_rows_times_panel(panel.p, a, a_stride, to + row, rows, k, depth, buffers.b_panels + i * size, panel.col,
                                 edge);
      }
    };
    if (shares_rows)
      team.share(items, false, [&](int64_t i) { item_times(i, {0, panels}); });
    else
      for (int64_t i = 0; i < items; ++i) item_times(i, team.split(panels));
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
