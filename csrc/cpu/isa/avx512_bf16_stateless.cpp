#include "cpu/isa/avx512_bf16.h"
#include "cpu/kernels/stateless.inl"
