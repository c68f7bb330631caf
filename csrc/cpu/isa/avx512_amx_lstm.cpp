#include "cpu/isa/avx512_amx.h"
#include "cpu/kernels/lstm.inl"
