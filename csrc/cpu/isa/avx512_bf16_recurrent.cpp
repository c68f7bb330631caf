#include "cpu/isa/avx512_bf16.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
