// The register tile under every product, and the row-by-panel product made of it.
//
// Every element of C is summed in ascending k within a block of k and block after block; neither the number of threads
// nor the place in a tile changes the result. Where a problem has few rows in all, k is dealt to several accumulators
// to hide the latency of the multiply-add.
#pragma once

#include <algorithm>

#include "cpu/simd/vec.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int kTileRows = 6;
constexpr int kTileVecs = FASTLM_VECTOR_BYTES == 64 ? 4 : 2;  // 24 of 32, or 12 of 16 registers accumulate

template <class T>
constexpr int64_t kCols = int64_t{kTileVecs} * Vec<T>::kLanes;
// k per block: a panel of floats and a tile of A fit in L1, and long sums gain accuracy from being cut.
template <class T>
constexpr int64_t kBlockDepth = 1024 / sizeof(T);
constexpr int64_t kBlockRows = 96;  // rows of A worked on with one panel

// The depth that a panel of P is stored with: of BFloat16 in pairs.
template <class P>
constexpr int64_t panel_depth(int64_t depth) {
  return std::is_same_v<P, BFloat16> ? (depth + 1) / 2 * 2 : depth;
}

enum class Init { kZero, kBias, kAccumulate };

template <class T, class P = T>
struct TileParams {
  const T* a;      // first element of the tile's first row
  int64_t a_row;   // stride of A between rows, which are contiguous in k; for kColumns between columns
  const P* panel;  // [depth][kCols] at panel_stride; P = BFloat16 for T = float: dense [depth / 2][kCols][2]
  int64_t panel_stride;
  int64_t depth;
  T* c;  // (rows, kCols) at c_stride
  int64_t c_stride;
  Init init;
  const T* bias;  // (kCols), read for Init::kBias only
  const P* next;  // what to fetch into L2 meanwhile, kFetchPerDepth elements per k; never dereferenced
};

// In elements, that is, half of it where a panel of BFloat16 meets sums of float.
template <class T>
constexpr int64_t kFetchPerDepth = 32 / sizeof(T);

// Rows R by the panel's first N vectors, with k dealt to D accumulators per element. kColumns: A lies as
// [depth][a_row].
template <class T, class P, int R, int N, int D, bool kColumns>
FASTLM_NOINLINE void tile_product(const TileParams<T, P>& p) {
  using V = Vec<T>;
  V acc[D][R][N];
  for (int i = 0; i < D; ++i)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v) acc[i][r][v] = V::zero();
  for (int r = 0; r < R; ++r) __builtin_prefetch(p.c + r * p.c_stride, 1);

  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = kColumns ? p.a + r : p.a + r * p.a_row;
  const P* panel = p.panel;
  const auto step = [&](int i, int64_t k) FASTLM_LAMBDA_INLINE {
    V b[N];
    for (int v = 0; v < N; ++v)
      if constexpr (std::is_same_v<T, P>)
        b[v] = V::load(panel + v * V::kLanes);
      else if (k % 2)
        b[v] = widen_pairs<true>(panel + 2 * v * V::kLanes);
      else
        b[v] = widen_pairs<false>(panel + 2 * v * V::kLanes);
    if (std::is_same_v<T, P>)
      panel += p.panel_stride;
    else if (k % 2)
      panel += 2 * kCols<T>;
    else if (R > 3)
      __asm__("" : "+r"(panel));  // the pairs are loaded again: kept, they would push sums out of registers
    for (int r = 0; r < R; ++r) {
      const V value = V::broadcast(kColumns ? rows[0][k * p.a_row + r] : rows[r][k]);
      for (int v = 0; v < N; ++v) acc[i][r][v] = fma(value, b[v], acc[i][r][v]);
    }
  };
  int64_t pair = 0;  // so that the compiler knows which k are even
#pragma GCC unroll 2
  for (; 2 * (pair + D) <= p.depth; pair += D) {
    // Few rows wait for loads as it is; what they read lies in sequence, which the processor fetches by itself.
    if (D == 1) __builtin_prefetch(p.next + 2 * pair * kFetchPerDepth<T>, 0, 2);
    for (int i = 0; i < 2 * D; ++i) step(i % D, 2 * pair + i);
  }
  for (int64_t k = 2 * pair; k < p.depth; ++k) step(0, k);

  for (int r = 0; r < R; ++r)
    for (int v = 0; v < N; ++v) {
      V sum = acc[0][r][v];
      for (int i = 1; i < D; ++i) sum = sum + acc[i][r][v];
      T* c = p.c + r * p.c_stride + v * V::kLanes;
      if (p.init == Init::kAccumulate) sum = sum + V::load(c);
      if (p.init == Init::kBias) sum = sum + V::load(p.bias + v * V::kLanes);
      sum.store(c);
    }
}

// Accumulators per element for a problem with `rows` rows of A in all (not per tile: see the note on bits above).
constexpr int accumulators(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

template <bool kColumns, class T, class P>
void run_tile(int rows, int deal, const TileParams<T, P>& p) {
  using Tile = void (*)(const TileParams<T, P>&);
  constexpr int kN = kTileVecs;
  static constexpr Tile kSingle[] = {tile_product<T, P, 1, kN, 1, kColumns>, tile_product<T, P, 2, kN, 1, kColumns>,
                                     tile_product<T, P, 3, kN, 1, kColumns>, tile_product<T, P, 4, kN, 1, kColumns>,
                                     tile_product<T, P, 5, kN, 1, kColumns>, tile_product<T, P, 6, kN, 1, kColumns>};
  static constexpr Tile kDouble[] = {tile_product<T, P, 1, kN, 2, kColumns>, tile_product<T, P, 2, kN, 2, kColumns>,
                                     tile_product<T, P, 3, kN, 2, kColumns>};
  if (deal == 4) return tile_product<T, P, 1, kN, 4, kColumns>(p);
  (deal == 2 ? kDouble : kSingle)[rows - 1](p);
}

// Compiled once for an ISA, with the product that is nothing else (gemm_entry.inl), since all families use them; those
// of BFloat16 alone have no such file.
#define FASTLM_SHARED_TILES(keyword)                                          \
  keyword template void run_tile<false>(int, int, const TileParams<float>&);  \
  keyword template void run_tile<true>(int, int, const TileParams<float>&);   \
  keyword template void run_tile<false>(int, int, const TileParams<double>&); \
  keyword template void run_tile<true>(int, int, const TileParams<double>&);  \
  keyword template void run_tile<false>(int, int, const TileParams<float, BFloat16>&)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_TILES(extern);
#endif

// What tile i of a block of weights fetches: its share of `next`, the first two tiles together all of it.
template <class T, class P>
const P* fetch_ahead(const P* weights, const P* next, int64_t i) {
  return i < 2 ? next + i * kFetchPerDepth<T> : weights;
}

// C (rows, kCols) = init + A (rows, depth) * panel, with rows of A contiguous in k. `deal` = accumulators(all rows);
// `next`: the panel wanted after this one.
template <class T, class P>
void panel_product(const T* a, int64_t a_stride, int64_t rows, const P* panel, int64_t panel_stride, int64_t depth,
                   T* c, int64_t c_stride, Init init, const T* bias, int deal, const P* next) {
  const int64_t limit = deal == 1 ? kTileRows : deal == 2 ? 3 : 1;
  const int64_t tiles = (rows + limit - 1) / limit;
  for (int64_t k = 0; k < depth || k == 0; k += kBlockDepth<T>) {
    const int64_t block = std::min(kBlockDepth<T>, depth - k);
    const P* weights = panel + k * panel_stride;
    const P* behind = k + block < depth ? weights + block * panel_stride : next;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
      run_tile<false>(
          static_cast<int>(end - begin), deal,
          TileParams<T, P>{a + begin * a_stride + k, a_stride, weights, panel_stride, block, c + begin * c_stride,
                           c_stride, k == 0 ? init : Init::kAccumulate, bias, fetch_ahead<T>(weights, behind, i)});
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
