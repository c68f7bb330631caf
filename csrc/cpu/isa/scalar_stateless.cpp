#include "cpu/isa/scalar.h"
#include "cpu/kernels/stateless.inl"
