#include "cpu/isa/avx2.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
