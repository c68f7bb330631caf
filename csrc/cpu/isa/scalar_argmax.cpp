#include "cpu/isa/scalar.h"
#include "cpu/kernels/argmax.inl"
