// The instruction sets that kernels are compiled for, the choice at run time, and one table of entries per set.
#pragma once

#include <string>
#include <vector>

#include "core/params.h"
#include "cpu/argmax.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/recurrent.h"
#include "cpu/stream.h"
#include "cpu/team.h"

namespace fastlm::cpu {

template <class T>
struct GemmKernels {
  void (*gemm)(const GemmParams<T>&, int threads, ParallelFor);
  bool (*splits)(const GemmParams<T>&);  // whether it makes such a product from split numbers, by its sizes
  // On the calling thread for about `seconds`, in GFLOP/s: fused multiply-adds in registers; the tile under every
  // product with operands in L1, which a busy neighbour on the same core slows more.
  double (*fma_peak)(double seconds);
  double (*tile_peak)(double seconds);
};

template <class S>
struct RecurrentKernels {
  void (*forward)(const RecurrentForwardParams<S>&, const RecurrentPlan&, ParallelFor);
  void (*backward)(const RecurrentBackwardParams<S>&, const RecurrentPlan&, ParallelFor);
  Stream<S>* (*stream)(const StreamParams<S>&);  // the caller's to delete
  int64_t rows_in_place;                         // of a single step forward, that weights need not be packed for
  int weight_bytes;                              // of a packed weight
};

template <class S>
struct AttentionKernels {
  void (*forward)(const AttentionForwardParams<S>&, const AttentionPlan&, ParallelFor);
  void (*backward)(const AttentionBackwardParams<S>&, const AttentionPlan&, ParallelFor);
};

template <class S>
struct CrossEntropyKernels {
  void (*run)(const CrossEntropyParams<S>&, const CrossEntropyPlan&, ParallelFor);
};

template <class S>
struct GeluKernels {
  void (*run)(const GeluParams<S>&, int threads, ParallelFor);
};

template <class S>
struct DropoutKernels {
  void (*run)(const DropoutParams<S>&, int threads, ParallelFor);
};

template <class T>
struct ArgmaxKernels {
  Argmax<T>* (*make)(const ArgmaxParams<T>&, int threads, ParallelFor);  // the caller's to delete
};

// For accuracy sweeps: y[i] = f(x[i]).
template <class T>
struct MathKernels {
  void (*exp)(const T* x, T* y, int64_t n);
  void (*exp2_nonpositive)(const T* x, T* y, int64_t n);
  void (*sigmoid)(const T* x, T* y, int64_t n);
  void (*tanh)(const T* x, T* y, int64_t n);
};

// One entry per operation family; a table per ISA and element type, filled by csrc/cpu/isa/<isa>_*.cpp.
template <class T>
struct Kernels {
  const GemmKernels<T>* gemm;
  const RecurrentKernels<T>*gru, *lstm;
  const AttentionKernels<T>* attention;
  const CrossEntropyKernels<T>* cross_entropy;
  const GeluKernels<T>* gelu;
  const DropoutKernels<T>* dropout;
  const ArgmaxKernels<T>* argmax;
  const MathKernels<T>* math;
};
template <>
struct Kernels<BFloat16> {
  const RecurrentKernels<BFloat16>*gru, *lstm;
  const AttentionKernels<BFloat16>* attention;
  const CrossEntropyKernels<BFloat16>* cross_entropy;
  const GeluKernels<BFloat16>* gelu;
  const DropoutKernels<BFloat16>* dropout;
};

// The table of the current ISA.
template <class T>
const Kernels<T>& kernels();

std::string isa();                       // name of the current one
std::vector<std::string> usable_isas();  // on this machine, plainest first
void set_isa(const std::string& name);   // throws std::invalid_argument with the usable ones; the process over
std::vector<std::string> built_isas();
bool outruns_mkl();  // whether the current one's products of floats do, on CPUs that MKL is not made for

}  // namespace fastlm::cpu
