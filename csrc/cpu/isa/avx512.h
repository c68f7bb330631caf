// Target: AVX-512 (F, DQ, BW, VL). Included first by avx512_*.cpp; holds for the rest of the file.
#include "cpu/isa/standard.h"

#pragma GCC target("avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
#define FASTLM_ISA_NAMESPACE avx512
#define FASTLM_VECTOR_BYTES 64
#define FASTLM_FMA_BYTES 64
