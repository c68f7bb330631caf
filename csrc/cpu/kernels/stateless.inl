// What an instruction set has besides the recurrent layers. Few files to a target: each reads the same headers and
// compiles the same inner products again, which is most of the time that a build takes.
#pragma once

#include "cpu/kernels/attention.inl"
#include "cpu/kernels/cross_entropy.inl"
#ifndef FASTLM_BFLOAT16_ONLY
#include "cpu/kernels/argmax.inl"
#include "cpu/kernels/dropout.inl"
#include "cpu/kernels/gelu.inl"
#include "cpu/kernels/gemm_entry.inl"
#include "cpu/kernels/math.inl"
#endif
#ifdef FASTLM_FLOATS_ELSEWHERE
#include "cpu/kernels/split_entry.inl"
#endif
