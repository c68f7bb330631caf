#include "cpu/isa/wide.h"
#include "cpu/kernels/attention.inl"
