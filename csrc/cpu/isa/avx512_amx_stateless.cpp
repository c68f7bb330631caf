#include "cpu/isa/avx512_amx.h"
#include "cpu/kernels/stateless.inl"
