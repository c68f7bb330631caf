// Entry of the product of floats that are split, where that is worth it.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/split_gemm.inl"
#include "cpu/subnormals.h"

namespace fastlm::cpu {
namespace FASTLM_FLOATS_ELSEWHERE {
extern const GemmKernels<float> kGemmFloat;
}
namespace FASTLM_ISA_NAMESPACE {

// Splitting an element, and packing it, takes as long as some products with it.
inline bool is_split(const GemmParams<float>& p) {
  constexpr int64_t kRowsAtLeast = 384, kColumnsAtLeast = 64, kDepthAtLeast = 64;
  return !p.accumulate && p.m >= kRowsAtLeast && p.n >= kColumnsAtLeast && p.k >= kDepthAtLeast;
}

inline void split_gemm(const GemmParams<float>& p, int threads, ParallelFor parallel_for) {
  const auto plain = FASTLM_FLOATS_ELSEWHERE::kGemmFloat.gemm;
  if (!is_split(p)) return plain(p, threads, parallel_for);
  Workspace workspace;
  const auto take = [&] { return SplitGemmBuffers::take(workspace, panels_for<float>(p.n), p.k, threads); };
  take();
  workspace.allocate();
  const auto buffers = take();
  std::atomic<bool> beyond{false};
  const auto work_ns = static_cast<int64_t>(2. * p.m * p.n * p.k / kFlopsPerNs);
  run_team(parallel_for, threads, work_ns, [&](const Team& team) {
    const FlushSubnormals flushing;
    const TileRegisters in_use;
    const RangeWatch<SplitFloat> watch(&beyond);
    gemm(Products<float>{&p, 1}, std::array{RowRange{0, p.m, {0, 0}}}, buffers, team);
  });
  if (beyond) plain(p, threads, parallel_for);
}

inline double plain_fma_peak(double seconds) { return FASTLM_FLOATS_ELSEWHERE::kGemmFloat.fma_peak(seconds); }
inline double plain_tile_peak(double seconds) { return FASTLM_FLOATS_ELSEWHERE::kGemmFloat.tile_peak(seconds); }

extern const GemmKernels<float> kGemmFloat{split_gemm, is_split, plain_fma_peak, plain_tile_peak};

}  // namespace FASTLM_ISA_NAMESPACE
}  // namespace fastlm::cpu
