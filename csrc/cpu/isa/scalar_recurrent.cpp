#include "cpu/isa/scalar.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
