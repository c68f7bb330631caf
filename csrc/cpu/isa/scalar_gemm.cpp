#include "cpu/isa/scalar.h"
#include "cpu/kernels/gemm_entry.inl"
