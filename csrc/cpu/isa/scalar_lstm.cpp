#include "cpu/isa/scalar.h"
#include "cpu/kernels/lstm.inl"
