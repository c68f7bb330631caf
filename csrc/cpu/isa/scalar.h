// Target: the baseline of the build: 16-byte vectors, no fused multiply-add. Included first by scalar_*.cpp; holds for
// the rest of the file.
#include "cpu/isa/standard.h"

#define FASTLM_ISA_NAMESPACE scalar
#define FASTLM_VECTOR_BYTES 16
#define FASTLM_FMA_BYTES 0
