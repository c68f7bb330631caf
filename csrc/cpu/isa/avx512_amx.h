// Target: AVX-512 with tile registers for products of BFloat16 (AMX), for tensors of BFloat16 and for floats that are
// split into such; the rest is avx512's. Included first by avx512_amx_*.cpp; holds for the rest of the file.
#include "cpu/isa/standard.h"

#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
#define FASTLM_ISA_NAMESPACE avx512_amx
#define FASTLM_VECTOR_BYTES 64
#define FASTLM_FMA_BYTES 64
#define FASTLM_BFLOAT16_PAIRS 1
#define FASTLM_BFLOAT16_ONLY 1
#define FASTLM_BFLOAT16_INSTRUCTION 1
#define FASTLM_BFLOAT16_TILES 1
#define FASTLM_TILE_INSTRUCTIONS 1
#define FASTLM_FLOATS_ELSEWHERE avx512
