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

// The first part of x, the upper half of each word; x becomes the rest. Rounding by whole numbers leaves NaN in the
// rest, and after two parts a rest that is one itself.
FASTLM_INLINE FloatBits take_part(Vec<float>& x) {
  const FloatBits part = ((FloatBits)x.raw + 0x8000) & 0xffff0000;
  x = x - Vec<float>{(Vec<float>::Raw)part};
  return part;
}
FASTLM_INLINE FloatBits last_part(Vec<float> x) { return (FloatBits)x.raw & 0xffff0000; }

// use(part, words) for the parts of two vectors, whose numbers meet in pairs: x's below.
template <class Use>
FASTLM_INLINE void split_pairs(Vec<float> x, Vec<float> y, const Use& use) {
  unrolled<kParts>([&](int part) FASTLM_LAMBDA_INLINE {
    const bool last = part == kParts - 1;
    const FloatBits below = last ? last_part(x) : take_part(x), above = last ? last_part(y) : take_part(y);
    use(part, below >> 16 | above);
  });
}

// In a row of operands columns come in groups: a word of each part holds column i < 16 and, above, column i + 16.
constexpr int64_t kHalfGroup = kSplitColumns / 2;
static_assert(kHalfGroup == Vec<float>::kLanes);

// Where the words of the group of a column begin.
template <class Parts>
FASTLM_INLINE auto group_of(Parts* row, int64_t column) {
  using To = std::conditional_t<std::is_const_v<Parts>, const BFloat16, BFloat16>;
  return reinterpret_cast<To*>(row) + column / kSplitColumns * kPartsElements;
}
FASTLM_INLINE void store_group(Vec<float> x, Vec<float> y, BFloat16* group) {
  split_pairs(x, y, [&](int part, FloatBits words) FASTLM_LAMBDA_INLINE {
    memcpy(group + part * kSplitColumns, &words, sizeof(words));
  });
}
// Half a group; the other half may be another thread's.
FASTLM_INLINE void store_half(FloatBits words, bool above, BFloat16* to) {
#if FASTLM_FMA_BYTES == 64
  _mm512_mask_storeu_epi16(to, above ? 0xaaaaaaaa : 0x55555555, (__m512i)words);
#else
  for (int i = 0; i < kHalfGroup; ++i) {
    const auto half = static_cast<uint16_t>(above ? words[i] >> 16 : words[i]);
    memcpy(to + 2 * i + above, &half, sizeof(half));
  }
#endif
}

// Columns [column, column + kLanes) of a row of operands, the first n of x and zeros; and back, exactly.
template <class V>
FASTLM_INLINE void store_columns(const V& x, SplitFloat* row, int64_t column, int64_t n) {
  if constexpr (V::kParts > 1) {
    static_assert(V::kParts % 2 == 0);
    for (int i = 0; i < V::kParts; i += 2)
      store_group(x.parts[i], x.parts[i + 1], group_of(row, column + i * kHalfGroup));
  } else {
    const V whole = n < V::kLanes ? replace_outside(x, 0, n, 0.f) : x;
    const bool above = column % kSplitColumns != 0;
    BFloat16* group = group_of(row, column);
    split_pairs(whole, whole, [&](int part, FloatBits words) FASTLM_LAMBDA_INLINE {
      store_half(words, above, group + part * kSplitColumns);
    });
  }
}
template <class V>
FASTLM_INLINE V load_columns(const SplitFloat* row, int64_t column) {
  if constexpr (V::kParts > 1) {
    return V::each([&](int i)
                       FASTLM_LAMBDA_INLINE { return load_columns<Vec<float>>(row, column + i * Vec<float>::kLanes); });
  } else {
    const BFloat16* group = group_of(row, column);
    const auto load = [&](int part) FASTLM_LAMBDA_INLINE {
      FloatBits words;
      memcpy(&words, group + part * kSplitColumns, sizeof(words));
      return V{(typename V::Raw)(column % kSplitColumns == 0 ? words << 16 : words & 0xffff0000)};
    };
    return load(0) + load(1) + load(2);
  }
}
// Whole groups.
inline void clear_columns(SplitFloat* row, int64_t begin, int64_t end) {
  std::fill(row + begin, row + end, SplitFloat{});
}

// Rows split, in whole groups of columns, filled up with zeros.
inline void copy_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, SplitFloat* to,
                      int64_t to_stride) {
  using V = Vec<float>;
  V most = V::zero();
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < width; i += kSplitColumns) {
      for (int64_t half = 0; half < kSplitColumns; half += kHalfGroup)
        __builtin_prefetch(from + kRowsAhead * from_stride + i + half);  // rows may lie far apart
      const V x = load_as<V>(from + i, width - i);
      const V y = load_as<V>(from + i + kHalfGroup, std::max<int64_t>(width - i - kHalfGroup, 0));
      most = SplitRange::larger(x, SplitRange::larger(y, most));
      store_group(x, y, group_of(to, i));
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
  for (int64_t k = 0; k < depth; k += kSplitColumns)
    for (int64_t i = k; i < k + kHalfGroup; ++i)
      for (int64_t n = 0; n < width; n += V::kLanes) {
        const auto load = [&](int64_t row) FASTLM_LAMBDA_INLINE {
          __builtin_prefetch(from + (row + kSplitColumns) * from_stride + n);
          return row < depth ? load_as<V>(from + row * from_stride + n, std::max<int64_t>(cols - n, 0)) : V::zero();
        };
        const V x = load(i), y = load(i + kHalfGroup);
        most = SplitRange::larger(x, SplitRange::larger(y, most));
        const int64_t place = n / kPairColumns * pair_step + (k / kSplitColumns * 2 + n / kTileSide % 2) * kSplitTile;
        auto* to = reinterpret_cast<BFloat16*>(panel + place) + (i - k) * 2 * kTileSide;
        split_pairs(x, y, [&](int part, FloatBits words) FASTLM_LAMBDA_INLINE {
          memcpy(to + part * kSplitTile, &words, sizeof(words));
        });
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
          pairs_in_rows(group_of(rows, 0) + part * kSplitColumns, kPartsElements, kTileSide, kTileSide,
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
