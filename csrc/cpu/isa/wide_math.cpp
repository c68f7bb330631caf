#include "cpu/isa/wide.h"
#include "cpu/kernels/math.inl"
