#include "cpu/isa/avx512.h"
#include "cpu/kernels/cross_entropy.inl"
