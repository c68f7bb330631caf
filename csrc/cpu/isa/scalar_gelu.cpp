#include "cpu/isa/scalar.h"
#include "cpu/kernels/gelu.inl"
