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

enum class Init { kZero, kBias, kAccumulate };

template <class T>
struct TileParams {
  const T* a;      // first element of the tile's first row
  int64_t a_row;   // stride of A between rows, which are contiguous in k; unused where A is packed
  const T* panel;  // [depth][kCols] at panel_stride
  int64_t panel_stride;
  int64_t depth;
  T* c;  // (rows, kCols) at c_stride
  int64_t c_stride;
  Init init;
  const T* bias;  // (kCols), read for Init::kBias only
  const T* next;  // what to fetch into L2 meanwhile, kFetchPerDepth elements per k; never dereferenced
};

template <class T>
constexpr int64_t kFetchPerDepth = 32 / sizeof(T);

// Rows R, with k dealt to P accumulators per element. kPacked: A lies as [depth][kTileRows].
template <class T, int R, int P, bool kPacked>
__attribute__((noinline)) void tile_product(const TileParams<T>& p) {
  using V = Vec<T>;
  V acc[P][R][kTileVecs];
  for (int i = 0; i < P; ++i)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileVecs; ++v) acc[i][r][v] = V::zero();
  for (int r = 0; r < R; ++r) __builtin_prefetch(p.c + r * p.c_stride, 1);

  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = kPacked ? p.a + r : p.a + r * p.a_row;
  const T* panel = p.panel;
  const auto step = [&](int i, int64_t k) FASTLM_LAMBDA_INLINE {
    V b[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) b[v] = V::load(panel + v * V::kLanes);
    for (int r = 0; r < R; ++r) {
      const V value = V::broadcast(kPacked ? rows[0][k * kTileRows + r] : rows[r][k]);
      for (int v = 0; v < kTileVecs; ++v) acc[i][r][v] = fma(value, b[v], acc[i][r][v]);
    }
    panel += p.panel_stride;
  };
  int64_t k = 0;
#pragma GCC unroll 2
  for (; k + 2 * P <= p.depth; k += 2 * P) {
    __builtin_prefetch(p.next + k * kFetchPerDepth<T>, 0, 2);
    for (int i = 0; i < 2 * P; ++i) step(i % P, k + i);
  }
  for (; k < p.depth; ++k) step(0, k);

  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kTileVecs; ++v) {
      V sum = acc[0][r][v];
      for (int i = 1; i < P; ++i) sum = sum + acc[i][r][v];
      T* c = p.c + r * p.c_stride + v * V::kLanes;
      if (p.init == Init::kAccumulate) sum = sum + V::load(c);
      if (p.init == Init::kBias) sum = sum + V::load(p.bias + v * V::kLanes);
      sum.store(c);
    }
}

// Accumulators per element for a problem with `rows` rows of A in all (not per tile: see the note on bits above).
constexpr int accumulators(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

template <class T, bool kPacked>
void run_tile(int rows, int deal, const TileParams<T>& p) {
  using Tile = void (*)(const TileParams<T>&);
  static constexpr Tile kSingle[] = {tile_product<T, 1, 1, kPacked>, tile_product<T, 2, 1, kPacked>,
                                     tile_product<T, 3, 1, kPacked>, tile_product<T, 4, 1, kPacked>,
                                     tile_product<T, 5, 1, kPacked>, tile_product<T, 6, 1, kPacked>};
  static constexpr Tile kDouble[] = {tile_product<T, 1, 2, kPacked>, tile_product<T, 2, 2, kPacked>,
                                     tile_product<T, 3, 2, kPacked>};
  if (deal == 4) return tile_product<T, 1, 4, kPacked>(p);
  (deal == 2 ? kDouble : kSingle)[rows - 1](p);
}

// What tile i of a block of weights fetches: its share of `next`, the first two tiles together all of it.
template <class T>
const T* fetch_ahead(const T* weights, const T* next, int64_t i) {
  return i < 2 ? next + i * kFetchPerDepth<T> : weights;
}

// C (rows, kCols) = init + A (rows, depth) * panel, with rows of A contiguous in k. `deal` = accumulators(all rows);
// `next`: the panel wanted after this one.
template <class T>
void panel_product(const T* a, int64_t a_stride, int64_t rows, const T* panel, int64_t panel_stride, int64_t depth,
                   T* c, int64_t c_stride, Init init, const T* bias, int deal, const T* next) {
  const int64_t limit = deal == 1 ? kTileRows : deal == 2 ? 3 : 1;
  const int64_t tiles = (rows + limit - 1) / limit;
  for (int64_t k = 0; k < depth || k == 0; k += kBlockDepth<T>) {
    const int64_t block = std::min(kBlockDepth<T>, depth - k);
    const T* weights = panel + k * panel_stride;
    const T* behind = k + block < depth ? weights + block * panel_stride : next;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
      run_tile<T, false>(static_cast<int>(end - begin), deal,
                         {a + begin * a_stride + k, a_stride, weights, panel_stride, block, c + begin * c_stride,
                          c_stride, k == 0 ? init : Init::kAccumulate, bias, fetch_ahead(weights, behind, i)});
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
