// Dropout of values that lie dense (Srivastava et al. 2014): no mask is stored, backward is the same call.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/generator.h"
#include "cpu/simd/vec.h"

namespace fastlm::cpu::FASTLM_ISA_NAMESPACE {

template <class S>
void dropout(const DropoutParams<S>& p, int threads, ParallelFor parallel_for) {
  using T = Compute<S>;
  using V = Vec<T>;
  constexpr int64_t kRow = 65536;  // values under one pair of the generator's words
  constexpr int64_t kPart = 512;   // factors made at a time: they stay in L1
  static_assert(kRow % kPart == 0 && kPart % V::kLanes == 0);
  const auto generator = Dropout::make(p.probability, p.seed);
  run_team(parallel_for, threads, p.n, [&](const Team& team) {
    const auto own = team.split(p.n, kPart);
    alignas(64) T factors[kPart];
    for (int64_t part = own.begin; part < own.end; part += kPart) {
      generator.factors(static_cast<uint64_t>(part / kRow), part % kRow, 0, kPart, factors);
      const int64_t end = std::min(own.end, part + kPart);
      // A product, so that NaN stays NaN as in torch.
      for (int64_t i = part; i < end; i += V::kLanes)
        store_as(load_as<V>(p.x + i, end - i) * V::load(factors + i - part), p.result + i, end - i);
    }
  });
}

extern const DropoutKernels<float> kDropoutFloat{dropout<float>};
extern const DropoutKernels<double> kDropoutDouble{dropout<double>};
extern const DropoutKernels<BFloat16> kDropoutBFloat16{dropout<BFloat16>};

}  // namespace fastlm::cpu::FASTLM_ISA_NAMESPACE
