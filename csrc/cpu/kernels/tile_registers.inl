// Products of BFloat16 pairs by tile registers (AMX): 16 rows of 16 pairs each, times 16 rows of 16 columns of pairs,
// added to 16 x 16 floats by one instruction. Without the instructions their effect is computed, for tests.
//
// A tile's shape is the configuration's; it is the exact one of a product, so that nothing past its ends is read.
#pragma once

#include <algorithm>

#include "cpu/kernels/gemm.inl"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

constexpr int kTileSide = 16;              // rows of a tile; pairs or floats in a row of it
constexpr int kTilesRows = 2 * kTileSide;  // of A, worked on at once

// The memory operand of LDTILECFG: tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of B; `low`, for one tile
// of rows: 6 is A's, too.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // For `m` rows of A, at most two tiles, and `pairs` along the depth.
  static TileConfig of(int64_t m, int64_t pairs, bool low) {
    TileConfig config;
    const int64_t heights[2] = {std::min<int64_t>(m, kTileSide), low ? m : std::max<int64_t>(m - kTileSide, 0)};
    for (int i = 0; i < 8; ++i) {
      const bool sums = i < 4, b = i >= (low ? 7 : 6);
      const int64_t height = b ? pairs : sums ? heights[i / 2] : heights[i % 2];
      config.rows[i] = static_cast<uint8_t>(height);
      config.row_bytes[i] = static_cast<uint16_t>(height == 0 ? 0 : 4 * (sums || b ? kTileSide : pairs));
    }
    return config;
  }
};

#ifdef FASTLM_TILE_INSTRUCTIONS
// The clobber of memory stands for what is read, too: the compiler must have written it before.
FASTLM_INLINE void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
FASTLM_INLINE void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int I>
FASTLM_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
}
template <int I>
FASTLM_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(I) : "memory");
}
template <int I>
FASTLM_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(I) : "memory");
}
template <int C, int A, int B>
FASTLM_INLINE void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#else
struct EmulatedTiles {
  TileConfig config;
  uint32_t words[8][kTileSide][kTileSide];
};
inline thread_local EmulatedTiles emulated_tiles;

inline void load_config(const TileConfig& config) { emulated_tiles = {config, {}}; }
inline void release_tiles() { emulated_tiles = {}; }
template <int I>
void tile_zero() {
  memset(emulated_tiles.words[I], 0, sizeof(emulated_tiles.words[I]));
}
template <int I>
void tile_load(const void* from, int64_t stride) {
  tile_zero<I>();
  for (int r = 0; r < emulated_tiles.config.rows[I]; ++r)
    memcpy(emulated_tiles.words[I][r], static_cast<const char*>(from) + r * stride, emulated_tiles.config.row_bytes[I]);
}
template <int I>
void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < emulated_tiles.config.rows[I]; ++r)
    memcpy(static_cast<char*>(to) + r * stride, emulated_tiles.words[I][r], emulated_tiles.config.row_bytes[I]);
}
template <int C, int A, int B>
void tile_dot() {
  const auto as_float = [](uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  };
  const TileConfig& config = emulated_tiles.config;
  // As the instruction does it: the first and the second products of all pairs each to a sum, then both to C.
  for (int r = 0; r < config.rows[C]; ++r) {
    float first[kTileSide] = {}, second[kTileSide] = {};
    for (int k = 0; k < config.row_bytes[A] / 4; ++k)
      for (int n = 0; n < kTileSide; ++n) {
        const uint32_t a = emulated_tiles.words[A][r][k], b = emulated_tiles.words[B][k][n];
        first[n] += as_float(a << 16) * as_float(b << 16);
        second[n] += as_float(a & 0xffff0000) * as_float(b & 0xffff0000);
      }
    for (int n = 0; n < config.row_bytes[C] / 4; ++n) {
      const float sum = as_float(emulated_tiles.words[C][r][n]) + (first[n] + second[n]);
      memcpy(&emulated_tiles.words[C][r][n], &sum, sizeof(sum));
    }
  }
}
#endif

// Lives where a thread makes such products: configures tiles when their shape changes, and gives them back, since the
// system saves what is in use at every switch of threads.
class TileRegisters {
 public:
  TileRegisters() { shape() = {}; }
  ~TileRegisters() { release_tiles(); }
  TileRegisters(const TileRegisters&) = delete;

  static void configure(int64_t rows, int64_t pairs, bool low = false) {
    Shape& now = shape();
    if (now.rows == rows && now.pairs == pairs && now.low == low) return;
    now = {rows, pairs, low};
    load_config(TileConfig::of(rows, pairs, low));
  }

 private:
  struct Shape {
    int64_t rows = 0, pairs = 0;
    bool low = false;
  };
  static Shape& shape() {
    static thread_local Shape shape;
    return shape;
  }
};

template <int I>
using Constant = std::integral_constant<int, I>;
// body(i) for i = 0, ..., N - 1, each a constant, as the tiles' numbers must be.
template <class Body, int... I>
FASTLM_INLINE void each_constant_of(std::integer_sequence<int, I...>, const Body& body) {
  (body(Constant<I>{}), ...);
}
template <int N, class Body>
FASTLM_INLINE void each_constant(const Body& body) {
  each_constant_of(std::make_integer_sequence<int, N>{}, body);
}

struct TileProduct {
  const BFloat16 *a, *b;
  float* c;
  int64_t a_stride, b_stride, c_stride;  // of rows; of B, rows of pairs
  int64_t steps;                         // of the configuration's pairs
  bool accumulate;
};

// C of M x N tiles.
template <int M, int N>
FASTLM_NOINLINE void tile_block(const TileProduct& p) {
  const int64_t a_bytes = p.a_stride * 2, b_bytes = p.b_stride * 2, c_bytes = p.c_stride * 4;
  const auto for_sums = [&](auto body) FASTLM_LAMBDA_INLINE {
    body(std::integral_constant<int, 0>{}, p.c);
    if constexpr (N > 1) body(std::integral_constant<int, 1>{}, p.c + kTileSide);
    if constexpr (M > 1) body(std::integral_constant<int, 2>{}, p.c + kTileSide * p.c_stride);
    if constexpr (M > 1 && N > 1) body(std::integral_constant<int, 3>{}, p.c + kTileSide * p.c_stride + kTileSide);
  };
  for_sums([&](auto i, float* c) FASTLM_LAMBDA_INLINE {
    if (p.accumulate)
      tile_load<i>(c, c_bytes);
    else
      tile_zero<i>();
  });
  const BFloat16 *a = p.a, *b = p.b;
  for (int64_t step = 0; step < p.steps; ++step, a += 2 * kTileSide, b += kTileSide * p.b_stride) {
    tile_load<4>(a, a_bytes);
    tile_load<6>(b, b_bytes);
    tile_dot<0, 4, 6>();
    if constexpr (N > 1) {
      tile_load<7>(b + 2 * kTileSide, b_bytes);
      tile_dot<1, 4, 7>();
    }
    if constexpr (M > 1) {
      tile_load<5>(a + kTileSide * p.a_stride, a_bytes);
      tile_dot<2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) tile_dot<3, 5, 7>();
  }
  for_sums([&](auto i, float* c) FASTLM_LAMBDA_INLINE { tile_store<i>(c, c_bytes); });
}

// C (rows <= kTilesRows, cols) [+]= A B, where columns [i * kCols, ...) of B begin at b + i * panel_step. A lies in
// rows.
inline void tiles_product(int64_t rows, int64_t pairs, int64_t cols, const TileProduct& p, int64_t panel_step) {
  const auto add = [&](int64_t begin, int64_t end) {
    TileRegisters::configure(rows, std::clamp<int64_t>(end - begin, 1, kTileSide));
    TileProduct block = p;
    block.a += 2 * begin;
    block.steps = (end - begin + kTileSide - 1) / kTileSide;
    block.accumulate |= begin > 0;
    for (int64_t col = 0; col < cols; col += 2 * kTileSide) {
      block.b = p.b + begin * p.b_stride + col / kCols<float> * panel_step + 2 * (col % kCols<float>);
      block.c = p.c + col;
      const bool two = cols - col > kTileSide;
      (rows > kTileSide ? two ? tile_block<2, 2> : tile_block<2, 1> : two ? tile_block<1, 2> : tile_block<1, 1>)(block);
    }
  };
  const int64_t whole = pairs / kTileSide * kTileSide;
  if (whole > 0 || pairs == 0) add(0, whole);
  if (whole < pairs) add(whole, pairs);
}

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
