#include "cpu/isa/wide.h"
#include "cpu/kernels/cross_entropy.inl"
