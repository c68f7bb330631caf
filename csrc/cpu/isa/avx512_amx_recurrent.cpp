#include "cpu/isa/avx512_amx.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
