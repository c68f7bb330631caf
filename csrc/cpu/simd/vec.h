// One SIMD vector of T for the ISA that this translation unit is compiled for, and what it can do.
//
// The width comes from FASTLM_VECTOR_BYTES (16 scalar baseline, 32 AVX2, 64 AVX-512), set by csrc/cpu/isa/*.cpp beside
// the target pragma, with FASTLM_FMA_BYTES, the width of its fused multiply-add (0: none). Arithmetic is the compiler's
// vector extension, so one source serves every width, also a width wider than the target's registers (how the 64-byte
// geometry is tested without AVX-512). Contraction is off in the build: a fused multiply-add happens where fma() is
// written and nowhere else, so results cannot differ between two instantiations of the same formula.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/dtype.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

#define FASTLM_INLINE inline __attribute__((always_inline))
#define FASTLM_NOINLINE __attribute__((noinline))  // what would be compiled again at every call
#define FASTLM_LAMBDA_INLINE __attribute__((always_inline))

// body(i) for i = 0, ..., N - 1, or body(i, j) for M times N of them, written out. An array of vectors stays in
// registers where every index is a constant early on; of a loop that is in no other loop, the compiler unrolls late and
// keeps a copy in memory.
template <class Body, int... I>
FASTLM_INLINE void unrolled_over(std::integer_sequence<int, I...>, const Body& body) {
  (body(I), ...);
}
template <int N, class Body>
FASTLM_INLINE void unrolled(const Body& body) {
  unrolled_over(std::make_integer_sequence<int, N>{}, body);
}
template <int M, int N, class Body>
FASTLM_INLINE void unrolled(const Body& body) {
  unrolled<M * N>([&](int i) FASTLM_LAMBDA_INLINE { body(i / N, i % N); });
}

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};

// Parts of vectors are loaded and stored by masks where there are instructions for it. AddressSanitizer does not look
// at these.
#if (FASTLM_FMA_BYTES == 64 || (FASTLM_FMA_BYTES == 32 && FASTLM_VECTOR_BYTES == 32)) && !defined(__SANITIZE_ADDRESS__)
#define FASTLM_MASKS 1
#else
#define FASTLM_MASKS 0
#endif
#if FASTLM_MASKS && FASTLM_FMA_BYTES == 64
FASTLM_INLINE __mmask16 lane_bits(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#elif FASTLM_MASKS
template <class T>
FASTLM_INLINE __m256i lane_mask(int64_t n) {
  if constexpr (sizeof(T) == 4)
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

template <class T>
struct Vec {
  static constexpr int kParts = 1, kLanes = FASTLM_VECTOR_BYTES / sizeof(T);
  using Scalar = T;
  using Int = typename IntOf<T>::type;
  typedef T Raw __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
  typedef T RawUnaligned __attribute__((vector_size(FASTLM_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef Int RawInt __attribute__((vector_size(FASTLM_VECTOR_BYTES)));
  Raw raw;

  static FASTLM_INLINE Vec load(const T* p) { return {*reinterpret_cast<const RawUnaligned*>(p)}; }
  static FASTLM_INLINE Vec broadcast(T value) { return {value - Raw{}}; }
  static FASTLM_INLINE Vec zero() { return {Raw{}}; }
  FASTLM_INLINE void store(T* p) const { *reinterpret_cast<RawUnaligned*>(p) = raw; }

  // Past the caches, to a multiple of 64 bytes from which whole lines are written; stream_fence() before another thread
  // reads them.
  FASTLM_INLINE void stream(T* p) const {
#if FASTLM_FMA_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)raw);
#elif FASTLM_FMA_BYTES == 32 && FASTLM_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)raw);
#else
    store(p);
#endif
  }

  // The first n lanes (0 <= n <= kLanes); the rest is zero, and memory past n is not touched.
  static FASTLM_INLINE Vec load_partial(const T* p, int64_t n) {
    if (n >= kLanes) return load(p);
#if FASTLM_MASKS && FASTLM_FMA_BYTES == 64
    if constexpr (sizeof(T) == 4)
      return {_mm512_maskz_loadu_ps(lane_bits(n), p)};
    else
      return {_mm512_maskz_loadu_pd(lane_bits(n), p)};
#elif FASTLM_MASKS
    if constexpr (sizeof(T) == 4)
      return {_mm256_maskload_ps(p, lane_mask<T>(n))};
    else
      return {_mm256_maskload_pd(p, lane_mask<T>(n))};
#else
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
  }
  FASTLM_INLINE void store_partial(T* p, int64_t n) const {
    if (n >= kLanes) return store(p);
#if FASTLM_MASKS && FASTLM_FMA_BYTES == 64
    if constexpr (sizeof(T) == 4)
      return _mm512_mask_storeu_ps(p, lane_bits(n), raw);
    else
      return _mm512_mask_storeu_pd(p, lane_bits(n), raw);
#elif FASTLM_MASKS
    if constexpr (sizeof(T) == 4)
      return _mm256_maskstore_ps(p, lane_mask<T>(n), raw);
    else
      return _mm256_maskstore_pd(p, lane_mask<T>(n), raw);
#else
    T lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
  }

  friend FASTLM_INLINE Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
  friend FASTLM_INLINE Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
  friend FASTLM_INLINE Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
  friend FASTLM_INLINE Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }
  friend FASTLM_INLINE Vec operator-(Vec a) { return {-a.raw}; }
};

FASTLM_INLINE void stream_fence() {
#if FASTLM_FMA_BYTES >= 32
  _mm_sfence();
#endif
}

// What a vector of float is stored as in bfloat16: rounded to nearest even, NaN quiet.
using BFloat16Lanes __attribute__((vector_size(FASTLM_VECTOR_BYTES / 2))) = uint16_t;
using FloatBits __attribute__((vector_size(FASTLM_VECTOR_BYTES))) = uint32_t;

template <class T>
FASTLM_INLINE T widen(T value) {
  return value;
}
FASTLM_INLINE float widen(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
// Consecutive values as floats. Compilers make four instructions of what is two.
FASTLM_INLINE Vec<float> widen_lanes(const BFloat16* p) {
#if FASTLM_FMA_BYTES == 64
  const auto bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {(Vec<float>::Raw)((FloatBits)bits << 16)};
#elif FASTLM_FMA_BYTES == 32 && FASTLM_VECTOR_BYTES == 32
  const auto bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
#else
  BFloat16Lanes lanes;
  memcpy(&lanes, p, sizeof(lanes));
  return {(Vec<float>::Raw)(__builtin_convertvector(lanes, FloatBits) << 16)};
#endif
}
// The first or the second values of consecutive pairs as floats.
template <bool kSecond>
FASTLM_INLINE Vec<float> widen_pairs(const BFloat16* p) {
  FloatBits pairs;
  memcpy(&pairs, p, sizeof(pairs));
  return {(Vec<float>::Raw)(kSecond ? pairs & 0xffff0000 : pairs << 16)};
}

FASTLM_INLINE FloatBits bfloat16_bits(Vec<float> x) {
  const auto bits = (FloatBits)x.raw;
  const FloatBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return x.raw == x.raw ? rounded : FloatBits{} + 0x7fc0;
}

// Loads and stores of tensors that hold S: S itself or its Compute<S>. The first n lanes of a vector, all of a pack.
template <class V, class S>
FASTLM_INLINE V load_as(const S* p, int64_t n) {
  if constexpr (std::is_same_v<S, typename V::Scalar>) {
    return V::load_partial(p, n);
  } else if constexpr (V::kParts > 1) {
    return V::each([&](int i)
                       FASTLM_LAMBDA_INLINE { return load_as<typename V::V>(p + i * V::V::kLanes, V::V::kLanes); });
  } else {
    if (n >= V::kLanes) return widen_lanes(p);
#if FASTLM_MASKS && FASTLM_FMA_BYTES == 64
    const auto bits = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(lane_bits(n), p));
    return {(Vec<float>::Raw)((FloatBits)bits << 16)};
#else
    BFloat16 lanes[V::kLanes] = {};
    memcpy(lanes, p, n * sizeof(S));
    return widen_lanes(lanes);
#endif
  }
}
template <class V, class S>
FASTLM_INLINE void store_as(const V& x, S* p, int64_t n) {
  if constexpr (std::is_same_v<S, typename V::Scalar>) {
    x.store_partial(p, n);
  } else if constexpr (V::kParts > 1) {
    for (int i = 0; i < V::kParts; ++i) store_as(x.parts[i], p + i * V::V::kLanes, V::V::kLanes);
  } else {
    const auto lanes = __builtin_convertvector(bfloat16_bits(x), BFloat16Lanes);
    if (n >= V::kLanes)
      memcpy(p, &lanes, sizeof(lanes));  // one instruction
    else
#if FASTLM_MASKS && FASTLM_FMA_BYTES == 64
      _mm256_mask_storeu_epi16(p, lane_bits(n), (__m256i)lanes);
#else
      memcpy(p, &lanes, n * sizeof(S));
#endif
  }
}
// A result, past the caches or as above.
template <class V, class S>
FASTLM_INLINE void put_as(const V& x, S* p, int64_t n, bool streams) {
  if constexpr (std::is_same_v<S, typename V::Scalar>)
    if (streams) return x.stream(p);
  store_as(x, p, n);
}
// x as it comes back from a tensor of S.
template <class S, class V>
FASTLM_INLINE V rounded_to(const V& x) {
  if constexpr (std::is_same_v<S, typename V::Scalar>)
    return x;
  else if constexpr (V::kParts > 1)
    return V::each([&](int i) FASTLM_LAMBDA_INLINE { return rounded_to<S>(x.parts[i]); });
  else
    return {(typename V::Raw)(bfloat16_bits(x) << 16)};
}

#if FASTLM_FMA_BYTES == 64
FASTLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
}
FASTLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.raw, b.raw, c.raw)};
}
#elif FASTLM_FMA_BYTES == 32 && FASTLM_VECTOR_BYTES == 32
FASTLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
}
FASTLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.raw, b.raw, c.raw)};
}
#elif FASTLM_FMA_BYTES == 32
// The 64-byte geometry on 32-byte registers, half by half.
FASTLM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  __m256 halves[3][2];
  memcpy(halves, &a, 64), memcpy(halves + 1, &b, 64), memcpy(halves + 2, &c, 64);
  for (int i = 0; i < 2; ++i) halves[2][i] = _mm256_fmadd_ps(halves[0][i], halves[1][i], halves[2][i]);
  memcpy(&c, halves + 2, 64);
  return c;
}
FASTLM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  __m256d halves[3][2];
  memcpy(halves, &a, 64), memcpy(halves + 1, &b, 64), memcpy(halves + 2, &c, 64);
  for (int i = 0; i < 2; ++i) halves[2][i] = _mm256_fmadd_pd(halves[0][i], halves[1][i], halves[2][i]);
  memcpy(&c, halves + 2, 64);
  return c;
}
#else
template <class T>
FASTLM_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
#endif

// The greater (smaller) of bound and x; NaN in x stays NaN, since the instruction gives its second operand then.
// Compilers do not find these instructions in a comparison of vectors.
#if FASTLM_FMA_BYTES == 64
FASTLM_INLINE Vec<float> at_least(Vec<float> bound, Vec<float> x) {
  return {_mm512_maskz_max_ps(0xffff, bound.raw, x.raw)};
}
FASTLM_INLINE Vec<float> at_most(Vec<float> bound, Vec<float> x) {
  return {_mm512_maskz_min_ps(0xffff, bound.raw, x.raw)};
}
#elif FASTLM_VECTOR_BYTES == 32
FASTLM_INLINE Vec<float> at_least(Vec<float> bound, Vec<float> x) { return {_mm256_max_ps(bound.raw, x.raw)}; }
FASTLM_INLINE Vec<float> at_most(Vec<float> bound, Vec<float> x) { return {_mm256_min_ps(bound.raw, x.raw)}; }
#endif
template <class T>
FASTLM_INLINE Vec<T> at_least(Vec<T> bound, Vec<T> x) {
  return {x.raw < bound.raw ? bound.raw : x.raw};
}
template <class T>
FASTLM_INLINE Vec<T> at_most(Vec<T> bound, Vec<T> x) {
  return {x.raw > bound.raw ? bound.raw : x.raw};
}

// N vectors side by side, worked on in step: a long chain of dependent operations leaves the units idle that the other
// chains fill.
template <class T, int N>
struct Pack {
  using V = Vec<T>;
  using Scalar = T;
  static constexpr int kParts = N, kLanes = N * V::kLanes;
  V parts[N];

  template <class F>
  static FASTLM_INLINE Pack each(const F& f) {
    Pack result;
    unrolled<N>([&](int i) FASTLM_LAMBDA_INLINE { result.parts[i] = f(i); });
    return result;
  }
  static FASTLM_INLINE Pack load(const T* p) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return V::load(p + i * V::kLanes); });
  }
  static FASTLM_INLINE Pack broadcast(T value) {
    return each([&](int) FASTLM_LAMBDA_INLINE { return V::broadcast(value); });
  }
  FASTLM_INLINE void store(T* p) const {
    unrolled<N>([&](int i) FASTLM_LAMBDA_INLINE { parts[i].store(p + i * V::kLanes); });
  }
  FASTLM_INLINE void stream(T* p) const {
    unrolled<N>([&](int i) FASTLM_LAMBDA_INLINE { parts[i].stream(p + i * V::kLanes); });
  }
  // A pack is always whole: whoever has fewer than n = kLanes values takes vectors.
  static FASTLM_INLINE Pack load_partial(const T* p, int64_t) { return load(p); }
  FASTLM_INLINE void store_partial(T* p, int64_t) const { store(p); }

  friend FASTLM_INLINE Pack operator+(const Pack& a, const Pack& b) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return a.parts[i] + b.parts[i]; });
  }
  friend FASTLM_INLINE Pack operator-(const Pack& a, const Pack& b) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return a.parts[i] - b.parts[i]; });
  }
  friend FASTLM_INLINE Pack operator*(const Pack& a, const Pack& b) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return a.parts[i] * b.parts[i]; });
  }
  friend FASTLM_INLINE Pack operator/(const Pack& a, const Pack& b) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return a.parts[i] / b.parts[i]; });
  }
  friend FASTLM_INLINE Pack operator-(const Pack& a) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return -a.parts[i]; });
  }
  friend FASTLM_INLINE Pack fma(const Pack& a, const Pack& b, const Pack& c) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return fma(a.parts[i], b.parts[i], c.parts[i]); });
  }
  friend FASTLM_INLINE Pack at_least(const Pack& bound, const Pack& x) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return at_least(bound.parts[i], x.parts[i]); });
  }
  friend FASTLM_INLINE Pack at_most(const Pack& bound, const Pack& x) {
    return each([&](int i) FASTLM_LAMBDA_INLINE { return at_most(bound.parts[i], x.parts[i]); });
  }
};

// c - a * b, for vectors and packs.
template <class V>
FASTLM_INLINE V fnma(const V& a, const V& b, const V& c) {
  return fma(-a, b, c);
}

// x held between low and high; NaN stays NaN.
template <class V>
FASTLM_INLINE V clamp(const V& x, typename V::Scalar low, typename V::Scalar high) {
  return at_most(V::broadcast(high), at_least(V::broadcast(low), x));
}

// x in lanes [begin, end), `other` in the rest; either number may lie outside of the lanes.
template <class T>
FASTLM_INLINE Vec<T> replace_outside(Vec<T> x, int64_t begin, int64_t end, T other) {
  using Int = typename Vec<T>::Int;
  typename Vec<T>::RawInt lane;
  unrolled<Vec<T>::kLanes>([&](int i) FASTLM_LAMBDA_INLINE { lane[i] = i; });
  return {(lane >= static_cast<Int>(begin)) & (lane < static_cast<Int>(end)) ? x.raw : Vec<T>::broadcast(other).raw};
}

// x where `keep` holds, `other` in the rest.
template <class T>
FASTLM_INLINE Vec<T> replace_where_not(const bool* keep, Vec<T> x, T other) {
  typedef uint8_t Bytes __attribute__((vector_size(Vec<T>::kLanes)));
  Bytes bytes;
  memcpy(&bytes, keep, sizeof(bytes));
  const auto lanes = __builtin_convertvector(bytes, typename Vec<T>::RawInt);
  return {lanes != 0 ? x.raw : Vec<T>::broadcast(other).raw};
}

template <class T>
struct Quad {
  typedef T type __attribute__((vector_size(16)));
};
// The lanes of x brought together by `op`, the upper half over the lower one until 16 bytes are left.
template <class Raw, class Op, size_t... I>
FASTLM_INLINE auto fold_halves(Raw x, const Op& op, std::index_sequence<I...> lanes) {
  const auto half = op(__builtin_shufflevector(x, x, I...), __builtin_shufflevector(x, x, (sizeof...(I) + I)...));
  if constexpr (sizeof(half) == 16)
    return half;
  else
    return fold_halves(half, op, std::make_index_sequence<lanes.size() / 2>{});
}
template <class T, class Op>
FASTLM_INLINE typename Quad<T>::type fold(Vec<T> x, const Op& op) {
  if constexpr (sizeof(x) == 16)
    return x.raw;
  else
    return fold_halves(x.raw, op, std::make_index_sequence<Vec<T>::kLanes / 2>{});
}
template <class T>
FASTLM_INLINE typename Quad<T>::type fold(Vec<T> x) {
  return fold(x, [](const auto& a, const auto& b) FASTLM_LAMBDA_INLINE { return a + b; });
}

// Of all lanes.
template <class T>
FASTLM_INLINE T total(Vec<T> x) {
  const auto quad = fold(x);
  T sum = quad[0];
  for (size_t i = 1; i < 16 / sizeof(T); ++i) sum += quad[i];
  return sum;
}
template <class T>
FASTLM_INLINE T largest(Vec<T> x) {
  const auto quad = fold(x, [](const auto& a, const auto& b) FASTLM_LAMBDA_INLINE { return a < b ? b : a; });
  T most = quad[0];
  for (size_t i = 1; i < 16 / sizeof(T); ++i) most = most < quad[i] ? quad[i] : most;
  return most;
}

// to[i] = onto[i] + the sum of all lanes of x_i, for four vectors at once.
FASTLM_INLINE void horizontal_sums(Vec<float> x0, Vec<float> x1, Vec<float> x2, Vec<float> x3, const float* onto,
                                   float* to) {
  const auto a = fold(x0), b = fold(x1), c = fold(x2), d = fold(x3);
  const auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  auto sums = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  auto start = sums;
  memcpy(&start, onto, sizeof(start));
  sums = sums + start;
  memcpy(to, &sums, sizeof(sums));
}
FASTLM_INLINE void horizontal_sums(Vec<double> x0, Vec<double> x1, Vec<double> x2, Vec<double> x3, const double* onto,
                                   double* to) {
  for (const Vec<double>& x : {x0, x1, x2, x3}) *to++ = total(x) + *onto++;
}

#if FASTLM_FMA_BYTES >= 32
FASTLM_INLINE __m256 load_8(const float* p) { return _mm256_loadu_ps(p); }
FASTLM_INLINE __m256 load_8(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

// to[k][n] = from[n][k] for 8 x 8 values, of which `rows` rows are there, zeros for the rest.
template <class S>
FASTLM_INLINE void transpose_8x8(const S* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows = 8) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = i < rows ? load_8(from + i * from_stride) : _mm256_setzero_ps();
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
