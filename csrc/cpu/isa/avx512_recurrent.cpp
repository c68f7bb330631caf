#include "cpu/isa/avx512.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
