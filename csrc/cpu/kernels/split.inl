// Floats in products of BFloat16 pairs, at the accuracy of floats (Henry, Tang & Heinecke 2019, arXiv:1904.06376).
//
// A float is the sum of three BFloat16, each the rest of those before it, rounded. Of the nine products of two floats'
// parts the six that reach 2^-24 of the first are made and summed in float. Tile registers do that more than twice as
// fast as the processor multiplies floats.
//
// Infinities have no parts, and products that overflow would be infinite with both signs where their sum is not NaN in
// floats: numbers from 2^58 on are noticed while they are split, and the whole operation is then made again in floats.
// Of numbers below 2^-110 the last parts become zero.
#pragma once

#include "cpu/kernels/operands.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int kParts = 3;
constexpr int64_t kPartsElements = kParts * kSplitColumns;          // of BFloat16, in a group of columns
constexpr int64_t kSplitTile = int64_t{kTileSide} * kSplitColumns;  // SplitFloats of a tile of a panel

// Whether a thread met a number too large to be split since it asked last. NaN is not.
class SplitRange {
 public:
  static void start() { most() = Vec<float>::zero(); }
  static void see(Vec<float> absolute) { most() = larger(absolute, most()); }
  static bool exceeded() { return largest(most()) >= 0x1p58f; }
  // The larger of |x| and what was seen before, which NaN leaves as it is.
  static FASTLM_INLINE Vec<float> larger(Vec<float> x, Vec<float> before) {
    return at_least(Vec<float>{(Vec<float>::Raw)((FloatBits)x.raw & 0x7fffffff)}, before);
  }

 private:
  static Vec<float>& most() {
    static thread_local Vec<float> value;
    return value;
  }
};

template <>
class RangeWatch<SplitFloat> {
 public:
  explicit RangeWatch(std::atomic<bool>* beyond) : beyond_(beyond) { SplitRange::start(); }
  ~RangeWatch() {
    if (SplitRange::exceeded()) *beyond_ = true;
  }
  RangeWatch(const RangeWatch&) = delete;

 private:
  std::atomic<bool>* beyond_;
};

// Stores the first part of x, returns the rest.
#ifdef FASTLM_BFLOAT16_INSTRUCTION
FASTLM_INLINE Vec<float> keep_part(Vec<float> x, BFloat16* to) {
  const auto lanes = (__m256i)_mm512_cvtneps_pbh(x.raw);
  memcpy(to, &lanes, sizeof(lanes));
  return x - Vec<float>{(Vec<float>::Raw)_mm512_slli_epi32(_mm512_cvtepu16_epi32(lanes), 16)};
}
#else
FASTLM_INLINE Vec<float> keep_part(Vec<float> x, BFloat16* to) {
  store_operand(x, to);
  return x - widen_lanes(to);
}
#endif
FASTLM_INLINE Vec<float> take_part(Vec<float> x, FloatBits& bits) {
  bits = operand_bits(x);
  return x - Vec<float>{(Vec<float>::Raw)(bits << 16)};
}

// Where the parts of 16 columns of a row from `column` on begin; they lie kSplitColumns apart.
template <class Parts>
FASTLM_INLINE auto parts_at(Parts* row, int64_t column) {
  using To = std::conditional_t<std::is_const_v<Parts>, const BFloat16, BFloat16>;
  return reinterpret_cast<To*>(row) + column / kSplitColumns * kPartsElements + column % kSplitColumns;
}
FASTLM_INLINE void split_into(Vec<float> x, BFloat16* to) {
  keep_part(keep_part(keep_part(x, to), to + kSplitColumns), to + 2 * kSplitColumns);
}

// Columns [column, column + kLanes) of a row of operands, the first n of x and zeros; and back, exactly.
template <class V>
FASTLM_INLINE void store_columns(const V& x, SplitFloat* row, int64_t column, int64_t n) {
  if constexpr (V::kParts > 1)
    unrolled<V::kParts>(
        [&](int i) FASTLM_LAMBDA_INLINE { split_into(x.parts[i], parts_at(row, column + i * Vec<float>::kLanes)); });
  else
    split_into(n < V::kLanes ? replace_outside(x, 0, n, 0.f) : x, parts_at(row, column));
}
inline void clear_columns(SplitFloat* row, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += Vec<float>::kLanes)
    for (int part = 0; part < kParts; ++part)
      std::fill_n(parts_at(row, i) + part * kSplitColumns, Vec<float>::kLanes, BFloat16{});
}
template <class V>
FASTLM_INLINE V load_columns(const SplitFloat* row, int64_t column) {
  const auto load = [&](int64_t at) FASTLM_LAMBDA_INLINE {
    const BFloat16* parts = parts_at(row, at);
    return widen_lanes(parts) + widen_lanes(parts + kSplitColumns) + widen_lanes(parts + 2 * kSplitColumns);
  };
  if constexpr (V::kParts > 1)
    return V::each([&](int i) FASTLM_LAMBDA_INLINE { return load(column + i * Vec<float>::kLanes); });
  else
    return load(column);
}

// Rows split, in whole groups of columns, filled up with zeros.
inline void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, SplitFloat* to,
                      int64_t to_stride) {
  using V = Vec<float>;
  V most = V::zero();
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < panel_depth<SplitFloat>(width); i += V::kLanes) {
      const V x = load_as<V>(from + i, std::max<int64_t>(width - i, 0));
      most = SplitRange::larger(x, most);
      split_into(x, parts_at(to, i));
    }
  SplitRange::see(most);
}

// Columns of a panel lie in pairs of tiles, whole ones: [pair][depth / 32][2][part][16 pairs along the depth][16][2].
static_assert(kPairColumns == 2 * kTileSide);

// From rows as they lie; the panel may have more, as `pair_step` tells.
inline void pack_part(const float* from, int64_t from_stride, int64_t depth, int64_t cols, SplitFloat* panel,
                      int64_t width, int64_t pair_step) {
  using V = Vec<float>;
  V most = V::zero();
  for (int64_t k = 0; k < panel_depth<SplitFloat>(depth); k += 2, from += 2 * from_stride)
    for (int64_t n = 0; n < width; n += V::kLanes) {
      const int64_t place = n / kPairColumns * pair_step + (k / kSplitColumns * 2 + n / kTileSide % 2) * kSplitTile;
      auto* to = reinterpret_cast<BFloat16*>(panel + place) + k % kSplitColumns * kTileSide;
      V rest[2];
      for (int i = 0; i < 2; ++i) {
        rest[i] = k + i < depth ? load_as<V>(from + i * from_stride + n, std::max<int64_t>(cols - n, 0)) : V::zero();
        most = SplitRange::larger(rest[i], most);
      }
      for (int part = 0; part < kParts; ++part) {
        FloatBits bits[2];
        for (int i = 0; i < 2; ++i) rest[i] = take_part(rest[i], bits[i]);
        const FloatBits words = pair_lanes(bits[0], bits[1]);
        memcpy(to + part * kSplitTile, &words, sizeof(words));
      }
    }
  SplitRange::see(most);
}
inline void pack_panel(const float* from, int64_t from_stride, int64_t depth, int64_t cols, SplitFloat* panel,
                       int64_t width) {
  pack_part(from, from_stride, depth, cols, panel, width, pair_step(depth));
}
inline void pack_rows(const float* from, int64_t from_stride, int64_t depth, int64_t cols, SplitFloat* panel) {
  pack_panel(from, from_stride, depth, cols, panel, kCols<float>);
}
// From columns as they lie.
inline void pack_transposed(const float* from, int64_t stride, int64_t depth, int64_t cols, SplitFloat* panel,
                            int64_t width = kCols<float>) {
  alignas(64) SplitFloat rows[kSplitTile];
  for (int64_t pair = 0; pair < width; pair += kPairColumns)
    for (int64_t k = 0; k < depth; k += kSplitColumns)
      for (int64_t n = pair; n < pair + kPairColumns; n += kTileSide, panel += kSplitTile) {
        const int64_t count = std::clamp<int64_t>(cols - n, 0, kTileSide);
        copy_rows(from + n * stride + k, stride, count, std::min(kSplitColumns, depth - k), rows, kSplitColumns);
        std::fill(rows + count * kSplitColumns, rows + kSplitTile, SplitFloat{});
        for (int part = 0; part < kParts; ++part)
          pairs_in_rows(parts_at(rows, 0) + part * kSplitColumns, kPartsElements, kTileSide, kTileSide,
                        reinterpret_cast<BFloat16*>(panel) + part * kSplitTile, kSplitColumns);
      }
}

struct SplitProduct {
  const SplitFloat *a, *b;
  float* c;
  int64_t a_stride, pair_step, c_stride;  // of rows, B's pairs of tiles, rows
  int64_t depth;
  const float* start;  // what C begins with, C itself or another; null: zeros
  int64_t start_stride;
};

// C of M x N tiles; one row of tiles keeps A's parts in registers. Parts meet in the same order in both, so that a sum
// does not depend on how many rows are made with it.
template <int M, int N>
FASTLM_NOINLINE void split_block(const SplitProduct& p) {
  const int64_t a_bytes = p.a_stride * static_cast<int64_t>(sizeof(SplitFloat));
  const auto for_sums = [&](auto body) FASTLM_LAMBDA_INLINE {
    each_constant<M * N>([&](auto i) FASTLM_LAMBDA_INLINE {
      constexpr int row = i / N, column = i % N;
      body(Constant < M == 1 ? column : 2 * row + column > {}, row * kTileSide, column * kTileSide);
    });
  };
  for_sums([&](auto tile, int64_t row, int64_t column) FASTLM_LAMBDA_INLINE {
    if (p.start)
      tile_load<tile>(p.start + row * p.start_stride + column, p.start_stride * 4);
    else
      tile_zero<tile>();
  });
  const auto* a = reinterpret_cast<const BFloat16*>(p.a);
  const auto* b = reinterpret_cast<const BFloat16*>(p.b);
  const auto load_a = [&](auto tile, int row, int part) FASTLM_LAMBDA_INLINE {
    tile_load<tile>(a + part * kSplitColumns + row * kTileSide * p.a_stride * kParts, a_bytes);
  };
  const int64_t pair_step = p.pair_step, steps = panel_depth<SplitFloat>(p.depth) / kSplitColumns;
  const auto load_b = [&](auto tile, int column, int part) FASTLM_LAMBDA_INLINE {
    tile_load<tile>(b + (column / 2 * pair_step + column % 2 * kSplitTile) * kParts + part * kSplitTile,
                    kSplitColumns * 2);
  };
  for (int64_t step = 0; step < steps; ++step, a += kPartsElements, b += 2 * kSplitTile * kParts) {
    if constexpr (M == 1) {
      load_a(Constant<4>{}, 0, 0), load_a(Constant<5>{}, 0, 1), load_a(Constant<6>{}, 0, 2);
      each_constant<N>([&](auto n) FASTLM_LAMBDA_INLINE {
        load_b(Constant<7>{}, n, 0), tile_dot<n, 6, 7>(), tile_dot<n, 5, 7>(), tile_dot<n, 4, 7>();
        load_b(Constant<7>{}, n, 2), tile_dot<n, 4, 7>();
        load_b(Constant<7>{}, n, 1), tile_dot<n, 4, 7>(), tile_dot<n, 5, 7>();
      });
    } else {
      const auto multiply = [&] {
        tile_dot<0, 4, 6>();
        if constexpr (N > 1) tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        if constexpr (N > 1) tile_dot<3, 5, 7>();
      };
      const auto load_rows = [&](int part) FASTLM_LAMBDA_INLINE {
        load_a(Constant<4>{}, 0, part), load_a(Constant<5>{}, 1, part);
      };
      const auto load_columns = [&](int part) FASTLM_LAMBDA_INLINE {
        load_b(Constant<6>{}, 0, part);
        if constexpr (N > 1) load_b(Constant<7>{}, 1, part);
      };
      load_rows(2), load_columns(0), multiply();
      load_rows(1), multiply();
      load_rows(0), multiply();
      load_columns(2), multiply();
      load_columns(1), multiply();
      load_rows(1), multiply();
    }
  }
  for_sums([&](auto tile, int64_t row, int64_t column)
               FASTLM_LAMBDA_INLINE { tile_store<tile>(p.c + row * p.c_stride + column, p.c_stride * 4); });
}

// C (rows <= kTilesRows, cols up to a panel's, in whole tiles) [+]= A B.
inline void split_tiles(int64_t rows, int64_t cols, const SplitProduct& p) {
  static constexpr auto kLow = table<4>([](auto n) { return &split_block<1, n>; });
  static constexpr auto kHigh = table<2>([](auto n) { return &split_block<2, n>; });
  TileRegisters::configure(rows, kTileSide, rows <= kTileSide);
  const int64_t most = rows > kTileSide ? 2 : 4, tiles = (cols + kTileSide - 1) / kTileSide;
  SplitProduct block = p;
  for (int64_t i = 0; i < tiles; i += most) {
    const int64_t count = std::min(most, tiles - i);
    block.b = p.b + i / 2 * p.pair_step, block.c = p.c + i * kTileSide;
    if (p.start) block.start = p.start + i * kTileSide;
    (rows > kTileSide ? kHigh[count - 1] : kLow[count - 1])(block);
  }
}

// The same for any number of rows and one panel, as rows_times_panel() of operands.inl.
inline void split_rows_times_panel(const SplitFloat* a, int64_t a_stride, int64_t rows, const SplitFloat* panel,
                                   int64_t pair_step, int64_t cols, int64_t depth, float* c, int64_t c_stride,
                                   Init init, const float* bias) {
  const bool adds = init == Init::kAccumulate;
  for (int64_t r = 0; r < rows; r += kTilesRows) {
    float* to = c + r * c_stride;
    const float* start = adds ? to : init == Init::kBias ? bias : nullptr;
    split_tiles(std::min<int64_t>(kTilesRows, rows - r), cols,
                {a + r * a_stride, panel, to, a_stride, pair_step, c_stride, depth, start, adds ? c_stride : 0});
  }
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
