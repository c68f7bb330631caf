#include "cpu/isa/wide.h"
#include "cpu/kernels/gru.inl"
#include "cpu/kernels/lstm.inl"
