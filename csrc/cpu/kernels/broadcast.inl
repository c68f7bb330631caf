// C = init + A W^T for some dozens of rows of A, with W read in place as a layer stores it (N, K): packing W would cost
// as much as the product. A, the smaller one, is turned into panels [K][rows], against which every weight is broadcast;
// what comes out is C^T, in tiles that stay in L1 until they are turned back.
//
// Every element is summed in ascending k within a block of k and block after block, whatever its place in a tile.
#pragma once

#include <algorithm>

#include "cpu/kernels/tile.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

// Beyond, packing W costs less than reading A in turn for each few weights.
constexpr int64_t kBroadcastRowsAtMost = FASTLM_VECTOR_BYTES == 64 ? 96 : 48;
// Rows lie in groups of up to three vectors, of two where there are more; beside them so many weights: up to 18 of 32,
// or 12 of 16 registers accumulate.
constexpr int kGroupVecs = 3;
constexpr int broadcast_weights(int vectors) {
  return vectors == 3 ? (FASTLM_VECTOR_BYTES == 64 ? 6 : 4) : vectors == 2 && FASTLM_VECTOR_BYTES < 64 ? 6 : 8;
}

// Rows of A laid out for it, filled up with zeros to whole vectors: groups of [depth][rows of the group].
struct RowGroups {
  int64_t rows, padded, group;

  template <class T>
  static RowGroups of(int64_t rows) {
    constexpr int64_t lanes = Vec<T>::kLanes;
    const int64_t padded = (rows + lanes - 1) / lanes * lanes;
    return {rows, padded, padded <= kGroupVecs * lanes ? padded : (kGroupVecs - 1) * lanes};
  }
  // body(first row, rows filled up, rows) of each group.
  template <class Body>
  void each(const Body& body) const {
    for (int64_t m = 0; m < padded; m += group) body(m, std::min(group, padded - m), std::min(group, rows - m));
  }
};

// Columns [begin, end) of `depth` columns of A.
template <class T>
void turn_rows(const RowGroups& groups, const T* a, int64_t stride, int64_t depth, int64_t begin, int64_t end,
               T* panels) {
  groups.each([&](int64_t m, int64_t width, int64_t rows) {
    const T* from = a + m * stride;
    T* to = panels + m * depth;
    int64_t i = 0;
#if FASTLM_FMA_BYTES >= 32
    if constexpr (sizeof(T) == 4)
      for (; i + 8 <= rows; i += 8) {
        int64_t k = begin;
        for (; k + 8 <= end; k += 8) transpose_8x8(from + i * stride + k, stride, to + k * width + i, width);
        for (; k < end; ++k)
          for (int r = 0; r < 8; ++r) to[k * width + i + r] = from[(i + r) * stride + k];
      }
#endif
    for (; i < width; ++i)
      for (int64_t k = begin; k < end; ++k) to[k * width + i] = i < rows ? from[i * stride + k] : T(0);
  });
}

// What columns from n on start from, 8 of them or one; c: where they are to go.
template <class T>
const T* start_of(Init init, const T* bias, int64_t n, const T* c) {
  static constexpr T kNothing[8] = {};
  return init == Init::kAccumulate ? c : init == Init::kBias ? bias + n : kNothing;
}

// C (rows, count) = init + sums (count, width)^T.
template <class T>
void turn_sums(const T* sums, int64_t width, int64_t rows, int64_t count, T* c, int64_t c_stride, Init init,
               const T* bias) {
  int64_t n = 0;
#if FASTLM_FMA_BYTES >= 32
  if constexpr (sizeof(T) == 4)
    for (; n + 8 <= count; n += 8)
      for (int64_t m = 0; m < rows; m += 8) {
        T turned[8][8];
        transpose_8x8(sums + n * width + m, width, turned[0], 8);
        for (int64_t i = 0; i < std::min<int64_t>(8, rows - m); ++i) {
          T* to = c + (m + i) * c_stride + n;
          _mm256_storeu_ps(to, _mm256_add_ps(load_8(turned[i]), load_8(start_of(init, bias, n, to))));
        }
      }
#endif
  for (; n < count; ++n)
    for (int64_t m = 0; m < rows; ++m) {
      T* to = c + m * c_stride + n;
      *to = sums[n * width + m] + *start_of(init, bias, n, to);
    }
}

template <class T>
struct BroadcastTile {
  const T* w;  // (weights, depth) at w_stride
  int64_t w_stride;
  const T* panel;  // [depth][N vectors]
  int64_t depth;
  T* sums;  // [weight][N vectors]
  bool accumulate;
  const T* next;  // rows of W that are wanted after these; never dereferenced
};

template <class T, int N, int W>
FASTLM_NOINLINE void broadcast_tile(const BroadcastTile<T>& p) {
  using V = Vec<T>;
  V acc[W][N];
  const auto place = [&](int j, int v) FASTLM_LAMBDA_INLINE { return p.sums + (j * N + v) * V::kLanes; };
  unrolled<W, N>([&](int j, int v) FASTLM_LAMBDA_INLINE { acc[j][v] = V::zero(); });
  const T* panel = p.panel;
  const auto step = [&](int64_t k) FASTLM_LAMBDA_INLINE {
    V a[N];
    unrolled<N>([&](int v) FASTLM_LAMBDA_INLINE { a[v] = V::load(panel + v * V::kLanes); });
    panel += N * V::kLanes;
    unrolled<W>([&](int j) FASTLM_LAMBDA_INLINE {
      const V weight = V::broadcast(p.w[j * p.w_stride + k]);
      unrolled<N>([&](int v) FASTLM_LAMBDA_INLINE { acc[j][v] = fma(weight, a[v], acc[j][v]); });
    });
  };
  int64_t k = 0;
  for (; k + kLine<T> <= p.depth; k += kLine<T>) {
    unrolled<W>([&](int j) FASTLM_LAMBDA_INLINE { __builtin_prefetch(p.next + j * p.w_stride + k); });
#pragma GCC unroll 2
    for (int i = 0; i < kLine<T>; ++i) step(k + i);
  }
  for (; k < p.depth; ++k) step(k);
  // Added only here: long sums gain accuracy from being cut.
  if (p.accumulate)
    unrolled<W, N>([&](int j, int v) FASTLM_LAMBDA_INLINE { acc[j][v] = acc[j][v] + V::load(place(j, v)); });
  unrolled<W, N>([&](int j, int v) FASTLM_LAMBDA_INLINE { acc[j][v].store(place(j, v)); });
}

template <class T, int N>
constexpr auto broadcast_tiles() {
  return table<broadcast_weights(N)>([](auto w) { return &broadcast_tile<T, N, w>; });
}
template <class T>
void run_broadcast_tile(int64_t vectors, int64_t weights, const BroadcastTile<T>& p) {
  static constexpr auto kOne = broadcast_tiles<T, 1>(), kTwo = broadcast_tiles<T, 2>();
  static constexpr auto kThree = broadcast_tiles<T, 3>();
  (vectors == 1 ? kOne[weights - 1] : vectors == 2 ? kTwo[weights - 1] : kThree[weights - 1])(p);
}

template <class T>
struct BroadcastParams {
  const T* panels;  // of the rows, by turn_rows
  const T* w;       // (count, depth) at w_stride
  int64_t w_stride;
  int64_t count;  // at most kCols
  int64_t depth;
  T* c;  // (rows, count) at c_stride
  int64_t c_stride;
  Init init;
  const T* bias;  // (count), read for Init::kBias only
  T* sums;        // scratch: kCols x rows filled up
};

template <class T>
void broadcast_product(const RowGroups& groups, const BroadcastParams<T>& p) {
  const int64_t together = broadcast_weights(static_cast<int>(groups.group / Vec<T>::kLanes));
  const int64_t tiles = (p.count + together - 1) / together;
  for (int64_t k = 0; k < p.depth || k == 0; k += kBlockDepth<T>)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = p.count * i / tiles, end = p.count * (i + 1) / tiles;
      const T* w = p.w + begin * p.w_stride + k;
      groups.each([&](int64_t m, int64_t width, int64_t) {
        run_broadcast_tile(
            width / Vec<T>::kLanes, end - begin,
            BroadcastTile<T>{w, p.w_stride, p.panels + m * p.depth + k * width, std::min(kBlockDepth<T>, p.depth - k),
                             p.sums + m * kCols<T> + begin * width, k > 0, w + (end - begin) * p.w_stride});
      });
    }
  groups.each([&](int64_t m, int64_t width, int64_t rows) {
    turn_sums(p.sums + m * kCols<T>, width, rows, p.count, p.c + m * p.c_stride, p.c_stride, p.init, p.bias);
  });
}

#define FASTLM_SHARED_BROADCASTS(keyword)                                                   \
  keyword template void broadcast_product(const RowGroups&, const BroadcastParams<float>&); \
  keyword template void broadcast_product(const RowGroups&, const BroadcastParams<double>&)
#ifndef FASTLM_BFLOAT16_ONLY
FASTLM_SHARED_BROADCASTS(extern);
#endif

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
