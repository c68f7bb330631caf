#include "cpu/isa/wide.h"
#include "cpu/kernels/gemm_entry.inl"
