#include "cpu/isa/wide_amx.h"
#include "cpu/kernels/stateless.inl"
