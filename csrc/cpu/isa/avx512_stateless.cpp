#include "cpu/isa/avx512.h"
#include "cpu/kernels/stateless.inl"
