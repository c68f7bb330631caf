#include "cpu/isa/scalar.h"
#include "cpu/kernels/attention.inl"
