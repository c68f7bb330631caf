// C = init + A W^T for few rows of A, with W read in place as a layer stores it (N, K): no packing, which would cost
// more than the product. Vectors run along k; a tile of rows x weight rows shares its loads, then lanes are added up.
// Every element is summed in the same order whatever its place in a tile.
#pragma once

#include <algorithm>

#include "cpu/kernels/tile.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Whether this is the way for so many rows. Long sums hide what a tile costs around them; of more than 12 rows, those
// that nearly fill vectors are better off in broadcast.inl, which takes no BFloat16. With vectors of 64 bytes it always
// is.
template <class S>
constexpr bool dot_is_faster(int64_t rows, int64_t depth) {
  constexpr int64_t lanes = Vec<Compute<S>>::kLanes;
  const bool fills = std::is_same_v<S, Compute<S>> && 5 * rows >= (rows + lanes - 1) / lanes * lanes * 4;
  return rows <= 12 || (FASTLM_VECTOR_BYTES == 32 && depth >= 32 * lanes && rows <= 24 && !fills);
}
// Rows of A per tile, at most, and rows of W beside them: up to 24 of 32, or 12 of 16 registers accumulate.
constexpr int kDotRows = FASTLM_VECTOR_BYTES == 64 ? 6 : 3;
constexpr int dot_weights(int rows) { return rows <= (FASTLM_VECTOR_BYTES == 64 ? 3 : 1) ? 8 : 4; }

template <class S, class A = Compute<S>>
struct DotParams {
  using T = Compute<S>;
  const A* a;  // (rows, depth) at a_stride
  int64_t a_stride;
  const S* w;  // (count, depth) at w_stride
  int64_t w_stride;
  int64_t count;  // columns of C; fewer than a tile's at the edge
  int64_t depth;
  T* c;  // (rows, count) at c_stride
  int64_t c_stride;
  Init init;
  const T* bias;       // (count), read for Init::kBias only
  int64_t rows_ahead;  // so much further on, rows of w are called for meanwhile; 0: none are
};

// Lines to be called for beside line k of a tile's rows j: at next + k * step + j * row.
template <class S>
struct LinesAhead {
  const S* next;  // or null
  int64_t step, row;
};

template <class S, class A, int R, int W>
FASTLM_NOINLINE void dot_tile(const DotParams<S, A>& p, const LinesAhead<S>& ahead) {
  using T = Compute<S>;
  using V = Vec<T>;
  V acc[R][W];
  unrolled<R, W>([&](int r, int j) FASTLM_LAMBDA_INLINE { acc[r][j] = V::zero(); });
  const S* w[W] = {p.w};  // a missing column repeats the last one; its sum is not stored
  unrolled<W - 1>([&](int j) FASTLM_LAMBDA_INLINE { w[j + 1] = w[j] + (j + 1 < p.count ? p.w_stride : 0); });
  const auto step = [&](int64_t k, int64_t n) FASTLM_LAMBDA_INLINE {
    V a[R];
    unrolled<R>([&](int r) FASTLM_LAMBDA_INLINE { a[r] = load_as<V>(p.a + r * p.a_stride + k, n); });
    unrolled<W>([&](int j) FASTLM_LAMBDA_INLINE {
      const V weight = load_as<V>(w[j] + k, n);
      unrolled<R>([&](int r) FASTLM_LAMBDA_INLINE { acc[r][j] = fma(a[r], weight, acc[r][j]); });
    });
  };
  int64_t k = 0;
  for (; ahead.next && k + kLine<S> <= p.depth; k += kLine<S>) {
    unrolled<W>([&](int j)
                    FASTLM_LAMBDA_INLINE { __builtin_prefetch(ahead.next + k * ahead.step + j * ahead.row, 0, 2); });
    unrolled<kLine<S> / V::kLanes>([&](int i) FASTLM_LAMBDA_INLINE { step(k + i * V::kLanes, V::kLanes); });
  }
  for (; k + V::kLanes <= p.depth; k += V::kLanes) step(k, V::kLanes);
  if (k < p.depth) step(k, p.depth - k);

  static constexpr T kNothing[4] = {};
  unrolled<R, W / 4>([&](int r, int quad) FASTLM_LAMBDA_INLINE {
    const int64_t j = 4 * quad, n = std::clamp<int64_t>(p.count - j, 0, 4);
    T* c = p.c + r * p.c_stride + j;
    const T* onto = p.init == Init::kAccumulate ? c : p.init == Init::kBias ? p.bias + j : kNothing;
    const auto sum = [&](const T* from, T* to) FASTLM_LAMBDA_INLINE {
      horizontal_sums(acc[r][j], acc[r][j + 1], acc[r][j + 2], acc[r][j + 3], from, to);
    };
    if (n == 4) return sum(onto, c);
    T edge[4] = {};
    std::copy_n(onto, n, edge);
    sum(edge, edge);
    std::copy_n(edge, n, c);
  });
}

// How far on to call for rows of weights that are so many bytes in all: many lie in L3's far end or in memory, and the
// processor's own prefetching, which ends with a page, is late there; few are near, where calls only cost.
inline int64_t dot_rows_ahead(int64_t bytes) {
  constexpr int64_t kNear = 8 << 20, kRows = 16;
  return bytes < kNear ? 0 : kRows;
}

// C (rows, count) = init + A (rows, depth) W (count, depth)^T. Long sums are cut, for accuracy.
template <class S, class A = Compute<S>>
void dot_product(DotParams<S, A> p, int64_t rows) {
  static constexpr auto kAlone = table<kDotRows>([](auto r) { return &dot_tile<S, A, r, dot_weights(r)>; });
  static constexpr auto kOfSeveral = table<kDotRows>([](auto r) { return &dot_tile<S, A, r, dot_weights(kDotRows)>; });
  const auto& tiles = rows <= kDotRows ? kAlone : kOfSeveral;
  const int64_t width = dot_weights(static_cast<int>(std::clamp<int64_t>(rows, 1, kDotRows)));
  const int64_t depth = p.depth, block = kDeep<Compute<S>>;
  // Rows that lie dense are called for in sequence: memory gives neighbours faster.
  const bool dense = p.w_stride == depth;
  const int64_t line_step = dense ? width : 1, line_row = dense ? kLine<S> : p.w_stride;
  for (; p.count > 0; p.count -= width, p.w += width * p.w_stride, p.c += width) {
    DotParams<S, A> tile = p;
    if (p.bias) p.bias += width;
    for (int64_t r = 0; r < rows; r += kDotRows, tile.c += kDotRows * p.c_stride)
      for (int64_t k = 0; k < depth || k == 0; k += block) {
        tile.a = p.a + r * p.a_stride + k, tile.w = p.w + k, tile.depth = std::min(block, depth - k);
        tile.init = k == 0 ? p.init : Init::kAccumulate;
        const S* next = r == 0 && p.rows_ahead > 0 ? p.w + p.rows_ahead * p.w_stride + k * line_step : nullptr;
        tiles[std::min<int64_t>(rows - r, kDotRows) - 1](tile, {next, line_step, line_row});
      }
  }
}

#define FASTLM_SHARED_DOTS(keyword)                                      \
  keyword template void dot_product(DotParams<float, float>, int64_t);   \
  keyword template void dot_product(DotParams<double, double>, int64_t); \
  keyword template void dot_product(DotParams<BFloat16, float>, int64_t)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_DOTS(extern);
#endif

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
