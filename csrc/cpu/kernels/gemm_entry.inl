// The product as an operation of its own, and the measures of what the machine could do. What other families share of
// products is compiled here too.
#pragma once

#include <chrono>

#include "cpu/cost.h"
#include "cpu/isa.h"
#include "cpu/kernels/operands.inl"
#include "cpu/subnormals.h"
#include "cpu/workspace.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class T>
void gemm_entry(const GemmParams<T>& p, int threads, ParallelFor parallel_for) {
  const auto work_ns = static_cast<int64_t>(2. * p.m * p.n * p.k / kFlopsPerNs);
  const auto run = [&](const auto& take, const auto& body) {
    Workspace workspace;
    take(workspace);
    workspace.allocate();
    const auto buffers = take(workspace);
    run_team(parallel_for, threads, work_ns, [&](const Team& team) {
      const FlushSubnormals flushing;
      body(buffers, team);
    });
  };
  if (reads_weights_in_place(p))
    return run([&](Workspace& workspace) { return FewRowsBuffers<T>::take(workspace, p, threads); },
               [&](const auto& buffers, const Team& team) { gemm_few_rows(p, buffers, team); });
  run([&](Workspace& workspace) { return GemmBuffers<T>::take(workspace, panels_for<T>(p.n), p.k, threads); },
      [&](const auto& buffers, const Team& team) { gemm(Products<T>{&p, 1}, buffers, team); });
}

// Rate over `seconds` of body(), which does so many floating-point operations; GFLOP/s.
template <class Body>
double measure_rate(double seconds, double flops, const Body& body) {
  using Clock = std::chrono::steady_clock;
  double elapsed = 0;
  int64_t rounds = 0;
  const auto start = Clock::now();
  do {
    body(), ++rounds;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  return flops * static_cast<double>(rounds) / elapsed / 1e9;
}

template <class T>
double fma_peak(double seconds) {
  using V = Vec<T>;
  constexpr int kChains = 12;
  constexpr int64_t kTimes = 10000;
  V acc[kChains];
  for (auto& a : acc) a = V::broadcast(1);
  // Opaque to the compiler, so that no step can be folded away.
  T scale = T(0.999), shift = T(0.001);
  __asm__ volatile("" : "+m"(scale), "+m"(shift));
  const V times = V::broadcast(scale), plus = V::broadcast(shift);
  const double rate = measure_rate(seconds, 2. * V::kLanes * kChains * kTimes, [&] {
    for (int64_t i = 0; i < kTimes; ++i)
      for (auto& a : acc) a = fma(a, times, plus);
  });
  V sum = V::zero();
  for (const auto& a : acc) sum = sum + a;
  volatile T sink = sum.raw[0];
  (void)sink;
  return rate;
}

template <class T>
double tile_peak(double seconds) {
  constexpr int64_t kDepth = kBlockDepth<T>, kTimes = 100;
  alignas(64) T a[kTileRows * kDepth] = {}, panel[kDepth * kCols<T>] = {}, c[kTileRows * kCols<T>];
  const TileParams<T> tile{a, kDepth, panel, kCols<T>, kDepth, c, kCols<T>, Init::kZero, nullptr, panel};
  return measure_rate(seconds, 2. * kTileRows * kDepth * kCols<T> * kTimes, [&] {
    for (int64_t i = 0; i < kTimes; ++i) run_tile<false>(kTileRows, 1, tile);
  });
}

template <class T>
bool never(const GemmParams<T>&) {
  return false;
}

FASTLM_SHARED_TILES();
FASTLM_SHARED_DOTS();
FASTLM_SHARED_BROADCASTS();
FASTLM_SHARED_PACKING();
FASTLM_SHARED_GEMM();
FASTLM_SHARED_NARROW_TILES();

extern const GemmKernels<float> kGemmFloat{gemm_entry<float>, never<float>, fma_peak<float>, tile_peak<float>};
extern const GemmKernels<double> kGemmDouble{gemm_entry<double>, never<double>, fma_peak<double>, tile_peak<double>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
