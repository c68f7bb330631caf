#include "cpu/isa/avx2.h"
#include "cpu/kernels/gemm_entry.inl"
