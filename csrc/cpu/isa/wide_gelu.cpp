#include "cpu/isa/wide.h"
#include "cpu/kernels/gelu.inl"
