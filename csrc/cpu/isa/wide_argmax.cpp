#include "cpu/isa/wide.h"
#include "cpu/kernels/argmax.inl"
