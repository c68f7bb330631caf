#include "cpu/isa/wide_amx.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
