#include "cpu/isa/avx2.h"
#include "cpu/kernels/stateless.inl"
