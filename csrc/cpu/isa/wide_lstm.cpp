#include "cpu/isa/wide.h"
#include "cpu/kernels/lstm.inl"
