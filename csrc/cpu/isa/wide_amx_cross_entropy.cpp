#include "cpu/isa/wide_amx.h"
#include "cpu/kernels/cross_entropy.inl"
