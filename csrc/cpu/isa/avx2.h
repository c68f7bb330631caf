// Target: AVX2 with FMA. Included first by avx2_*.cpp; holds for the rest of the file.
#include "cpu/isa/standard.h"

#pragma GCC target("avx2,fma")
#define FASTLM_ISA_NAMESPACE avx2
#define FASTLM_VECTOR_BYTES 32
#define FASTLM_FMA_BYTES 32
