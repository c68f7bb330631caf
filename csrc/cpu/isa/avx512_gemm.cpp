#include "cpu/isa/avx512.h"
#include "cpu/kernels/gemm_entry.inl"
