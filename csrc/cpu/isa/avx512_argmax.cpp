#include "cpu/isa/avx512.h"
#include "cpu/kernels/argmax.inl"
