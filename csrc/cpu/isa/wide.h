// Target: the 64-byte geometry of AVX-512 on AVX2's registers: tests of it on any machine, built under
// FASTLM_WIDE_ISA=1. Included first by wide_*.cpp; holds for the rest of the file.
#include "cpu/isa/standard.h"

#pragma GCC target("avx2,fma")
#define FASTLM_ISA_NAMESPACE wide
#define FASTLM_VECTOR_BYTES 64
#define FASTLM_FMA_BYTES 32
#define FASTLM_BFLOAT16_PAIRS 1
