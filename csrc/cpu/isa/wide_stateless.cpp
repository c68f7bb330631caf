#include "cpu/isa/wide.h"
#include "cpu/kernels/stateless.inl"
