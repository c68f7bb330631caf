#include "cpu/isa/scalar.h"
#include "cpu/kernels/math.inl"
