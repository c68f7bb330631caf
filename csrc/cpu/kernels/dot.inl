// C = init + A W^T for few rows of A, with W read in place as a layer stores it (N, K): no packing, which would cost
// more than the product. Vectors run along k; a tile of rows x weight rows shares its loads, then lanes are added up.
// Every element is summed in the same order whatever its place in a tile.
#pragma once

#include "cpu/kernels/tile.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int64_t kDotRowsAtMost = 12;  // beyond, packing a panel on the way is faster
constexpr int kDotRows = 3;             // rows of A per tile, each with kDotWeights accumulators

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
  const T* bias;  // (count), read for Init::kBias only
};

template <class S, class A, int R, int W>
FASTLM_NOINLINE void dot_tile(const DotParams<S, A>& p) {
  using T = Compute<S>;
  using V = Vec<T>;
  V acc[R][W];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < W; ++j) acc[r][j] = V::zero();
  const S* w[W];  // a missing column repeats the last one; its sum is not stored
  for (int j = 0; j < W; ++j) w[j] = p.w + std::min<int64_t>(j, p.count - 1) * p.w_stride;
  const auto step = [&](int64_t k, int64_t n) FASTLM_LAMBDA_INLINE {
    V a[R];
    for (int r = 0; r < R; ++r) a[r] = load_as<V>(p.a + r * p.a_stride + k, n);
    for (int j = 0; j < W; ++j) {
      const V weight = load_as<V>(w[j] + k, n);
      for (int r = 0; r < R; ++r) acc[r][j] = fma(a[r], weight, acc[r][j]);
    }
  };
  int64_t k = 0;
  for (; k + V::kLanes <= p.depth; k += V::kLanes) step(k, V::kLanes);
  if (k < p.depth) step(k, p.depth - k);

  for (int r = 0; r < R; ++r) {
    T sums[W];
    for (int j = 0; j < W; j += 4) horizontal_sums(acc[r] + j, sums + j);
    T* c = p.c + r * p.c_stride;
    for (int64_t j = 0; j < std::min<int64_t>(W, p.count); ++j)
      c[j] = sums[j] + (p.init == Init::kAccumulate ? c[j] : p.init == Init::kBias ? p.bias[j] : T(0));
  }
}

// C (rows, count) = init + A (rows, depth) W (count, depth)^T. Long sums are cut, for accuracy.
template <class S, class A = Compute<S>>
void dot_product(DotParams<S, A> p, int64_t rows) {
  const int64_t width = rows == 1 ? 8 : 4, depth = p.depth, block = 4 * kBlockDepth<Compute<S>>;
  for (; p.count > 0; p.count -= width, p.w += width * p.w_stride, p.c += width) {
    DotParams<S, A> tile = p;
    if (p.bias) p.bias += width;
    for (int64_t r = 0; r < rows; r += kDotRows, tile.c += kDotRows * p.c_stride)
      for (int64_t k = 0; k < depth || k == 0; k += block) {
        tile.a = p.a + r * p.a_stride + k, tile.w = p.w + k, tile.depth = std::min(block, depth - k);
        tile.init = k == 0 ? p.init : Init::kAccumulate;
        if (rows == 1)
          dot_tile<S, A, 1, 8>(tile);
        else if (rows - r == 1)
          dot_tile<S, A, 1, 4>(tile);
        else if (rows - r == 2)
          dot_tile<S, A, 2, 4>(tile);
        else
          dot_tile<S, A, kDotRows, 4>(tile);
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
