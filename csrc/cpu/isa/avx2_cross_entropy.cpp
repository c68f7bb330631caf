#include "cpu/isa/avx2.h"
#include "cpu/kernels/cross_entropy.inl"
