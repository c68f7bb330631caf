// Target: tile registers computed on AVX2, as "wide" is AVX-512's geometry on AVX2: tests of what avx512_amx does, on
// any machine, built under FASTLM_WIDE_ISA=1. Included first by wide_amx_*.cpp; holds for the rest of the file.
#include "cpu/isa/standard.h"

#pragma GCC target("avx2,fma")
#define FASTLM_ISA_NAMESPACE wide_amx
#define FASTLM_VECTOR_BYTES 64
#define FASTLM_FMA_BYTES 32
#define FASTLM_BFLOAT16_PAIRS 1
#define FASTLM_BFLOAT16_ONLY 1
#define FASTLM_BFLOAT16_TILES 1
#define FASTLM_FLOATS_ELSEWHERE wide
