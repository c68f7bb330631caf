#include "cpu/isa/scalar.h"
#include "cpu/kernels/cross_entropy.inl"
