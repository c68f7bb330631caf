// The register tile under every product, and the row-by-panel product made of it.
//
// Every element of C is summed in ascending k within a block of k and block after block; neither the number of threads
// nor the place in a tile changes the result. Where a problem has few rows in all, k is dealt to several accumulators
// to hide the latency of the multiply-add.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "cpu/simd/vec.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {
// A float as products of BFloat16 take it: the sum of three, which lie in groups of kSplitColumns, part by part
// (split.inl). Pointers are to whole groups.
struct SplitFloat {
  BFloat16 parts[3];
};
constexpr int64_t kSplitColumns = 32;
// Columns of a panel of them lie in pairs of tiles, this far apart.
constexpr int64_t kPairColumns = 32;
inline int64_t pair_step(int64_t depth) {
  return (depth + kSplitColumns - 1) / kSplitColumns * kSplitColumns * kPairColumns;
}
}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE

template <>
struct fastlm::ComputeOf<fastlm::cpu::FASTLM_ISA_NAMESPACE::SplitFloat> {
  using type = float;
};

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int kTileRows = 6;
constexpr int kTileVecs = FASTLM_VECTOR_BYTES == 64 ? 4 : 2;  // 24 of 32, or 12 of 16 registers accumulate

template <class T>
constexpr int64_t kCols = int64_t{kTileVecs} * Vec<T>::kLanes;
// k per block: a panel of floats and a tile of A fit in L1, and long sums gain accuracy from being cut.
template <class T>
constexpr int64_t kBlockDepth = (FASTLM_VECTOR_BYTES == 64 ? 512 : 1024) / sizeof(T);
// k at a time of what lies in L2.
template <class T>
constexpr int64_t kDeep = 4096 / sizeof(T);
constexpr int64_t kBlockRows = 96;  // rows of A worked on with one panel

template <class T>
constexpr int64_t lanes_down(int64_t n) {
  return n / Vec<T>::kLanes * Vec<T>::kLanes;
}
template <class T>
constexpr int64_t lanes_up(int64_t n) {
  return lanes_down<T>(n + Vec<T>::kLanes - 1);
}

// The depth that a panel of P is stored with: of BFloat16 in pairs.
template <class P>
constexpr int64_t panel_depth(int64_t depth) {
  constexpr int64_t together = std::is_same_v<P, BFloat16> ? 2 : std::is_same_v<P, SplitFloat> ? kSplitColumns : 1;
  return (depth + together - 1) / together * together;
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
  const P* next;  // what to fetch into L2 meanwhile, kFetched elements every second k; never dereferenced
};

// A cache line, and some.
template <class P>
constexpr int64_t kLine = 64 / sizeof(P);
template <class P>
constexpr int64_t kFetched = (FASTLM_VECTOR_BYTES == 64 ? 2 : 1) * kLine<P>;

// Rows R by the panel's first N vectors, with k dealt to D accumulators per element. kColumns: A lies as
// [depth][a_row].
template <class T, class P, int R, int N, int D, bool kColumns>
FASTLM_NOINLINE void tile_product(const TileParams<T, P>& p) {
  using V = Vec<T>;
  V acc[D][R][N];
  unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE {
    unrolled<D>([&](int i) FASTLM_LAMBDA_INLINE { acc[i][r][v] = V::zero(); });
  });
  const auto place = [c = p.c, stride = p.c_stride](int r, int v)
                         FASTLM_LAMBDA_INLINE { return c + r * stride + v * V::kLanes; };
  unrolled<R>([&](int r) FASTLM_LAMBDA_INLINE { __builtin_prefetch(place(r, 0), 1); });

  const T* rows[R];
  unrolled<R>([&](int r) FASTLM_LAMBDA_INLINE { rows[r] = kColumns ? p.a + r : p.a + r * p.a_row; });
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
    if (D == 1)
      for (int64_t i = 0; i < kFetched<P>; i += kLine<P>) __builtin_prefetch(p.next + pair * kFetched<P> + i, 0, 2);
    for (int i = 0; i < 2 * D; ++i) step(i % D, 2 * pair + i);
  }
  for (int64_t k = 2 * pair; k < p.depth; ++k) step(0, k);

  auto& sums = acc[0];
  const auto add = [&](const auto& get) FASTLM_LAMBDA_INLINE {
    unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE { sums[r][v] = sums[r][v] + get(r, v); });
  };
  unrolled<D - 1>(
      [&](int i) FASTLM_LAMBDA_INLINE { add([&](int r, int v) FASTLM_LAMBDA_INLINE { return acc[i + 1][r][v]; }); });
  if (p.init == Init::kAccumulate) add([&](int r, int v) FASTLM_LAMBDA_INLINE { return V::load(place(r, v)); });
  if (p.init == Init::kBias) add([&](int, int v) FASTLM_LAMBDA_INLINE { return V::load(p.bias + v * V::kLanes); });
  unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE { sums[r][v].store(place(r, v)); });
}

// Accumulators per element for a problem with `rows` rows of A in all (not per tile: see the note on bits above).
constexpr int accumulators(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// entry(n) for n = 1, ..., N, each a constant: functions to be chosen by a number.
template <class Entry, int... I>
constexpr auto table_over(std::integer_sequence<int, I...>, const Entry& entry) {
  return std::array{entry(std::integral_constant<int, I + 1>{})...};
}
template <int N, class Entry>
constexpr auto table(const Entry& entry) {
  return table_over(std::make_integer_sequence<int, N>{}, entry);
}

template <bool kColumns, class T, class P>
void run_tile(int rows, int deal, const TileParams<T, P>& p) {
  constexpr int kN = kTileVecs;
  static constexpr auto kSingle = table<kTileRows>([](auto r) { return &tile_product<T, P, r, kN, 1, kColumns>; });
  static constexpr auto kDouble = table<3>([](auto r) { return &tile_product<T, P, r, kN, 2, kColumns>; });
  if (deal == 4) return tile_product<T, P, 1, kN, 4, kColumns>(p);
  (deal == 2 ? kDouble[rows - 1] : kSingle[rows - 1])(p);
}

// Compiled once for an ISA, with the product that is nothing else (gemm_entry.inl), since both its files use them;
// those of BFloat16 alone have no such product.
#define FASTLM_SHARED_TILES(keyword)                                          \
  keyword template void run_tile<false>(int, int, const TileParams<float>&);  \
  keyword template void run_tile<true>(int, int, const TileParams<float>&);   \
  keyword template void run_tile<false>(int, int, const TileParams<double>&); \
  keyword template void run_tile<true>(int, int, const TileParams<double>&);  \
  keyword template void run_tile<false>(int, int, const TileParams<float, BFloat16>&)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_TILES(extern);
#endif

// The same for the first vectors of a panel, with no dealing.
template <bool kColumns, class T>
void run_narrow_tile(int rows, int64_t vectors, const TileParams<T>& p) {
  static constexpr auto kTiles = table<kTileVecs>([](auto n) {
    return table<kTileRows>([](auto r) { return &tile_product<T, T, r, decltype(n)::value, 1, kColumns>; });
  });
  kTiles[vectors - 1][rows - 1](p);
}

#define FASTLM_SHARED_NARROW_TILES(keyword)                                              \
  keyword template void run_narrow_tile<false>(int, int64_t, const TileParams<float>&);  \
  keyword template void run_narrow_tile<true>(int, int64_t, const TileParams<float>&);   \
  keyword template void run_narrow_tile<false>(int, int64_t, const TileParams<double>&); \
  keyword template void run_narrow_tile<true>(int, int64_t, const TileParams<double>&)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_NARROW_TILES(extern);
#endif

// Dense memory that is wanted after this product and that no prefetcher of the processor sees coming.
struct Ahead {
  const char *at, *end;

  template <class P>
  const P* take(int64_t count, const P* otherwise) {
    if (at >= end) return otherwise;
    at += count * static_cast<int64_t>(sizeof(P));
    return reinterpret_cast<const P*>(at) - count;
  }
};

// What tile i of a block of weights fetches: its share of `next`, as deep; the first tiles together all of it, then
// others of `ahead`.
template <class T, class P>
const P* fetch_ahead(const P* weights, const P* next, int64_t depth, int64_t i, Ahead* ahead = nullptr) {
  const int64_t count = depth / 2 * kFetched<P>;
  if (i * kFetched<P> < 2 * kCols<T>) return next + i * count;
  return ahead ? ahead->take(count, weights) : weights;
}

// Rows by the panel's first `cols` columns, rounded up to vectors; with dealing, or of BFloat16, by all of it.
template <bool kColumns, class T, class P>
void run_tile_of(int rows, int64_t cols, int deal, const TileParams<T, P>& p) {
  if constexpr (std::is_same_v<T, P>)
    if (deal == 1 && cols <= kCols<T> - Vec<T>::kLanes)
      return run_narrow_tile<kColumns>(rows, lanes_up<T>(cols) / Vec<T>::kLanes, p);
  run_tile<kColumns>(rows, deal, p);
}

// C (rows, cols up to kCols) = init + A (rows, depth) * panel, with rows of A contiguous in k; C has room for kCols.
// `deal` = accumulators(all rows); `next`: the panel wanted after this one; `ahead`: what is, later.
template <class T, class P>
void panel_product(const T* a, int64_t a_stride, int64_t rows, const P* panel, int64_t panel_stride, int64_t cols,
                   int64_t depth, T* c, int64_t c_stride, Init init, const T* bias, int deal, const P* next,
                   Ahead* ahead = nullptr) {
  const int64_t limit = deal == 1 ? kTileRows : deal == 2 ? 3 : 1;
  const int64_t tiles = (rows + limit - 1) / limit;
  for (int64_t k = 0; k < depth || k == 0; k += kBlockDepth<T>) {
    const int64_t block = std::min(kBlockDepth<T>, depth - k);
    const P* weights = panel + k * panel_stride;
    const P* behind = k + block < depth ? weights + block * panel_stride : next;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = rows * i / tiles, end = rows * (i + 1) / tiles;
      run_tile_of<false>(static_cast<int>(end - begin), cols, deal,
                         TileParams<T, P>{a + begin * a_stride + k, a_stride, weights, panel_stride, block,
                                          c + begin * c_stride, c_stride, k == 0 ? init : Init::kAccumulate, bias,
                                          fetch_ahead<T>(weights, behind, block, i, ahead)});
    }
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
