// What a product takes: numbers of the arithmetic type, or, where there are instructions for it, pairs of BFloat16
// along the depth whose two products are added to a float at once, or floats split into such.
//
// Operand<S> is the type that tensors of S meet in products. A lies in rows, contiguous along the depth, or in columns:
// [depth][columns], pairs [depth / 2][columns][2]. B lies in panels of the form of A's columns. Pairs are filled up
// with zeros where the depth is odd.
#pragma once

#include <atomic>

#include "cpu/kernels/gemm.inl"
#ifdef FASTLM_BFLOAT16_TILES
#include "cpu/kernels/tile_registers.inl"
#endif

#ifndef FASTLM_BFLOAT16_PAIRS
#define FASTLM_BFLOAT16_PAIRS 0
#endif

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

#ifdef FASTLM_FLOATS_ELSEWHERE
constexpr bool kSplitsFloats = true;
#else
constexpr bool kSplitsFloats = false;
#endif
template <class S>
using Operand =
    std::conditional_t<FASTLM_BFLOAT16_PAIRS && std::is_same_v<S, BFloat16>, BFloat16,
                       std::conditional_t<kSplitsFloats && std::is_same_v<S, float>, SplitFloat, Compute<S>>>;
template <class E>
constexpr bool kPairs = std::is_same_v<E, BFloat16>;
template <class E>
constexpr bool kSplit = std::is_same_v<E, SplitFloat>;
// Whether operands are no numbers of the arithmetic type, and lie apart from these.
template <class E>
constexpr bool kApart = kPairs<E> || kSplit<E>;
template <class E>
constexpr int64_t kPairing = kPairs<E> ? 2 : 1;

// Rows of C that one call of multiply() may make.
#ifdef FASTLM_BFLOAT16_TILES
template <class E>
constexpr int64_t kOperandRows = kApart<E> ? kTilesRows : kTileRows;
#else
template <class E>
constexpr int64_t kOperandRows = kTileRows;

struct TileRegisters {  // there are none
  ~TileRegisters() {}
};
#endif

// Lives where a member of a team works: sets a flag where it met numbers that operands cannot hold (split.inl).
template <class E>
struct RangeWatch {
  explicit RangeWatch(std::atomic<bool>*) {}
  ~RangeWatch() {}
};

inline int64_t even_up(int64_t n) { return (n + 1) / 2 * 2; }

// Rows are kept dense at a stride of an odd number of cache lines, so that a column of them uses all of the cache.
template <class E>
constexpr int64_t row_stride(int64_t width) {
  const int64_t line = kSplit<E> ? kSplitColumns : 64 / static_cast<int64_t>(sizeof(E));
  return ((width + line - 1) / line | 1) * line;
}

// Words of two BFloat16, the first below.
FASTLM_INLINE FloatBits pair_lanes(FloatBits first, FloatBits second) { return first | second << 16; }

// What a product takes of x: rounded, and subnormal numbers may become zero.
#ifdef FASTLM_BFLOAT16_INSTRUCTION
FASTLM_INLINE FloatBits operand_bits(Vec<float> x) {
  return (FloatBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh(x.raw));
}
FASTLM_INLINE void store_operand(Vec<float> x, BFloat16* to) {
  const auto lanes = (__m256i)_mm512_cvtneps_pbh(x.raw);
  memcpy(to, &lanes, sizeof(lanes));
}
#else
FASTLM_INLINE FloatBits operand_bits(Vec<float> x) { return bfloat16_bits(x); }
FASTLM_INLINE void store_operand(Vec<float> x, BFloat16* to) { store_as(x, to, Vec<float>::kLanes); }
#endif

// Columns [column, column + kLanes) of a row of operands, the first n of x and whatever fills them up; and back.
template <class V, class E>
FASTLM_INLINE void store_columns(const V& x, E* row, int64_t column, int64_t) {
  store_as(x, row + column, V::kLanes);
}
template <class V, class E>
FASTLM_INLINE V load_columns(const E* row, int64_t column) {
  return load_as<V>(row + column, V::kLanes);
}

// Zeros in columns [begin, end), whole vectors.
template <class E>
void clear_columns(E* row, int64_t begin, int64_t end) {
  std::fill(row + begin, row + end, E{});
}

// Rows converted and filled up with zeros, to whole vectors or pairs.
template <class S, class T>
void copy_rows(const S* from, int64_t from_stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
  using V = Vec<T>;
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < width; i += V::kLanes) load_as<V>(from + i, width - i).store(to + i);
}
inline void copy_rows(const BFloat16* from, int64_t from_stride, int64_t rows, int64_t width, BFloat16* to,
                      int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    std::copy_n(from, width, to);
    if (width % 2) to[width] = BFloat16{};
  }
}

// Rows as a panel's, of `width` columns in one panel at that stride of elements or pairs.
template <class S, class T>
void pack_panel(const S* from, int64_t from_stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
  copy_rows(from, from_stride, rows, width, to, to_stride);
}
template <class S>
void pack_panel(const S* from, int64_t from_stride, int64_t rows, int64_t width, BFloat16* to, int64_t to_stride) {
  using V = Vec<float>;
  for (int64_t r = 0; r < rows; r += 2, from += 2 * from_stride, to += 2 * to_stride) {
    const bool alone = r + 1 == rows;
    for (int64_t i = 0; i < width; i += V::kLanes) {
      const auto bits = [&](const S* row) FASTLM_LAMBDA_INLINE {
        const V lanes = load_as<V>(row + i, width - i);
        return kPairs<S> ? (FloatBits)lanes.raw >> 16 : operand_bits(lanes);
      };
      const FloatBits words = pair_lanes(bits(from), alone ? FloatBits{} : bits(from + from_stride));
      memcpy(to + 2 * i, &words, sizeof(words));
    }
    std::fill(to + 2 * lanes_up<float>(width), to + 2 * to_stride, BFloat16{});
  }
}

// The columns of panels of so many keys: fewer than kCols where one panel holds them all.
template <class T>
int64_t panel_width(int64_t keys) {
  return std::min(kCols<T>, lanes_up<T>(keys));
}

// All panels [dim][panel_width(end)] (of pairs along dim) that hold some of the keys, which count from the first
// panel's first.
template <class S, class E>
void pack_keys(const S* first, int64_t stride, int64_t begin, int64_t end, int64_t dim, E* panels) {
  constexpr int64_t cols = kCols<Compute<E>>;
  for (int64_t n = begin / cols * cols; n < end; n += cols)
    pack_transposed(first + n * stride, stride, dim, std::min(cols, end - n), panels + n * panel_depth<E>(dim),
                    panel_width<Compute<E>>(end));
}

// C (rows <= kOperandRows, columns rounded up to vectors) = [C +] A B, where panel i of B begins at b + i * panel_step.
template <class E>
struct PanelProduct {
  const E* a;
  int64_t a_stride;  // of rows, or of columns or pairs of them
  const E* b;
  int64_t b_stride, panel_step;  // of rows or pairs of them
  Compute<E>* c;
  int64_t c_stride;
};

#if FASTLM_BFLOAT16_PAIRS
FASTLM_INLINE Vec<float> add_pairs(Vec<float> sum, FloatBits a, FloatBits b) {
#ifdef FASTLM_BFLOAT16_INSTRUCTION
  return {_mm512_dpbf16_ps(sum.raw, (__m512bh)a, (__m512bh)b)};
#else
  const auto low = [](FloatBits x) { return Vec<float>{(Vec<float>::Raw)(x << 16)}; };
  const auto high = [](FloatBits x) { return Vec<float>{(Vec<float>::Raw)(x & 0xffff0000)}; };
  return fma(high(a), high(b), fma(low(a), low(b), sum));
#endif
}

// R rows by N vectors over `depth` of pairs.
template <int R, int N, bool kColumns>
FASTLM_NOINLINE void pairs_tile(const PanelProduct<BFloat16>& p, int64_t pairs, bool accumulate) {
  using V = Vec<float>;
  V sums[R][N];
  const auto place = [&](int r, int v) FASTLM_LAMBDA_INLINE { return p.c + r * p.c_stride + v * V::kLanes; };
  unrolled<R, N>([&](int r, int v)
                     FASTLM_LAMBDA_INLINE { sums[r][v] = accumulate ? V::load(place(r, v)) : V::zero(); });
  const BFloat16* panel = p.b;
  for (int64_t k = 0; k < pairs; ++k, panel += p.b_stride) {
    FloatBits b[N];
    for (int v = 0; v < N; ++v) memcpy(&b[v], panel + 2 * v * V::kLanes, sizeof(b[v]));
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      memcpy(&pair, kColumns ? p.a + k * p.a_stride + 2 * r : p.a + r * p.a_stride + 2 * k, sizeof(pair));
      for (int v = 0; v < N; ++v) sums[r][v] = add_pairs(sums[r][v], FloatBits{} + pair, b[v]);
    }
  }
  unrolled<R, N>([&](int r, int v) FASTLM_LAMBDA_INLINE { sums[r][v].store(place(r, v)); });
}

#ifdef FASTLM_BFLOAT16_TILES
constexpr int64_t kColumnDepth = 128;  // at most, of A in columns: in rows, it lies on the stack

// Rows of pairs from columns of them: words of four bytes, transposed.
inline void pairs_in_rows(const BFloat16* from, int64_t from_stride, int64_t rows, int64_t pairs, BFloat16* to,
                          int64_t to_stride) {
  for (int64_t k = 0; k < pairs; k += 8)
    for (int64_t r = 0; r < rows; r += 8) {
      const BFloat16* block = from + k * from_stride + 2 * r;
      BFloat16* turned = to + r * to_stride + 2 * k;
      if (k + 8 <= pairs && r + 8 <= rows)
        transpose_8x8(reinterpret_cast<const float*>(block), from_stride / 2, reinterpret_cast<float*>(turned),
                      to_stride / 2);
      else
        for (int64_t i = 0; i < std::min<int64_t>(8, pairs - k); ++i)
          for (int64_t j = 0; j < std::min<int64_t>(8, rows - r); ++j)
            std::copy_n(block + i * from_stride + 2 * j, 2, turned + j * to_stride + 2 * i);
    }
}

template <bool kColumns>
void multiply(int64_t rows, int64_t depth, int64_t cols, const PanelProduct<BFloat16>& p, bool accumulate) {
  const int64_t pairs = (depth + 1) / 2;
  TileProduct product{p.a, p.b, p.c, p.a_stride, p.b_stride, p.c_stride, 0, accumulate};
  if constexpr (kColumns) {
    alignas(64) BFloat16 a[kTilesRows * kColumnDepth];
    pairs_in_rows(p.a, p.a_stride, rows, pairs, a, kColumnDepth);
    product.a = a, product.a_stride = kColumnDepth;
    tiles_product(rows, pairs, cols, product, p.panel_step);
  } else {
    tiles_product(rows, pairs, cols, product, p.panel_step);
  }
}
#else
template <bool kColumns>
void multiply(int64_t rows, int64_t depth, int64_t cols, const PanelProduct<BFloat16>& p, bool accumulate) {
  static constexpr auto kTiles = table<kTileVecs>(
      [](auto n) { return table<kTileRows>([](auto r) { return &pairs_tile<r, decltype(n)::value, kColumns>; }); });
  for (int64_t col = 0; col < cols; col += kCols<float>) {
    const int64_t vectors = (std::min(kCols<float>, cols - col) + Vec<float>::kLanes - 1) / Vec<float>::kLanes;
    PanelProduct<BFloat16> tile = p;
    tile.b += col / kCols<float> * p.panel_step, tile.c += col;
    kTiles[vectors - 1][rows - 1](tile, (depth + 1) / 2, accumulate);
  }
}
#endif
#endif

template <bool kColumns, class T>
void multiply(int64_t rows, int64_t depth, int64_t cols, const PanelProduct<T>& p, bool accumulate) {
  for (int64_t k = 0; k < depth || k == 0; k += kBlockDepth<T>, accumulate = true)  // of no depth: zeros
    for (int64_t col = 0; col < cols; col += kCols<T>) {
      const int64_t vectors = (std::min(kCols<T>, cols - col) + Vec<T>::kLanes - 1) / Vec<T>::kLanes;
      const T* panel = p.b + col / kCols<T> * p.panel_step + k * p.b_stride;
      run_narrow_tile<kColumns>(static_cast<int>(rows), vectors,
                                TileParams<T>{p.a + k * (kColumns ? p.a_stride : 1), p.a_stride, panel, p.b_stride,
                                              std::min(kBlockDepth<T>, depth - k), p.c + col, p.c_stride,
                                              accumulate ? Init::kAccumulate : Init::kZero, nullptr, panel});
    }
}

// C (rows, cols up to kCols) = init + A (rows, depth) times one dense panel; C has room for kCols, and pairs fill it.
// `deal`, `next`, `ahead` as panel_product() has them.
template <class E, class P, class T>
void rows_times_panel(const E* a, int64_t a_stride, int64_t rows, const P* panel, int64_t cols, int64_t depth, T* c,
                      int64_t c_stride, Init init, const T* bias, int deal, const P* next, Ahead* ahead = nullptr) {
  if constexpr (kSplit<E>) {
    split_rows_times_panel(a, a_stride, rows, panel, pair_step(depth), cols, depth, c, c_stride, init, bias);
  } else if constexpr (kPairs<E>) {
    for (int64_t r = 0; bias && init == Init::kBias && r < rows; ++r) std::copy_n(bias, kCols<T>, c + r * c_stride);
    for (int64_t r = 0; r < rows; r += kOperandRows<E>)
      multiply<false>(
          std::min<int64_t>(kOperandRows<E>, rows - r), depth, kCols<T>,
          PanelProduct<E>{a + r * a_stride, a_stride, panel, kPairing<E> * kCols<T>, 0, c + r * c_stride, c_stride},
          init != Init::kZero);
  } else {
    panel_product(a, a_stride, rows, panel, kCols<T>, cols, depth, c, c_stride, init, bias, deal, next, ahead);
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE

#ifdef FASTLM_FLOATS_ELSEWHERE
#include "cpu/kernels/split.inl"
#endif
