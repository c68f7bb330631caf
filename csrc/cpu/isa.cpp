#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm::cpu {

#define FASTLM_DECLARE_ISA(isa)                                                                                      \
  namespace isa {                                                                                                    \
  extern const GemmKernels<float> kGemmFloat;                                                                        \
  extern const GemmKernels<double> kGemmDouble;                                                                      \
  extern const RecurrentKernels<float> kGruFloat, kLstmFloat;                                                        \
  extern const RecurrentKernels<double> kGruDouble, kLstmDouble;                                                     \
  extern const RecurrentKernels<BFloat16> kGruBFloat16, kLstmBFloat16;                                               \
  extern const AttentionKernels<float> kAttentionFloat;                                                              \
  extern const AttentionKernels<double> kAttentionDouble;                                                            \
  extern const AttentionKernels<BFloat16> kAttentionBFloat16;                                                        \
  extern const CrossEntropyKernels<float> kCrossEntropyFloat;                                                        \
  extern const CrossEntropyKernels<double> kCrossEntropyDouble;                                                      \
  extern const CrossEntropyKernels<BFloat16> kCrossEntropyBFloat16;                                                  \
  extern const GeluKernels<float> kGeluFloat;                                                                        \
  extern const GeluKernels<double> kGeluDouble;                                                                      \
  extern const GeluKernels<BFloat16> kGeluBFloat16;                                                                  \
  extern const DropoutKernels<float> kDropoutFloat;                                                                  \
  extern const DropoutKernels<double> kDropoutDouble;                                                                \
  extern const DropoutKernels<BFloat16> kDropoutBFloat16;                                                            \
  extern const ArgmaxKernels<float> kArgmaxFloat;                                                                    \
  extern const ArgmaxKernels<double> kArgmaxDouble;                                                                  \
  extern const MathKernels<float> kMathFloat;                                                                        \
  extern const MathKernels<double> kMathDouble;                                                                      \
  constexpr Kernels<float> kFloat{&kGemmFloat, &kGruFloat,     &kLstmFloat,   &kAttentionFloat, &kCrossEntropyFloat, \
                                  &kGeluFloat, &kDropoutFloat, &kArgmaxFloat, &kMathFloat};                          \
  constexpr Kernels<double> kDouble{&kGemmDouble,      &kGruDouble,          &kLstmDouble,                           \
                                    &kAttentionDouble, &kCrossEntropyDouble, &kGeluDouble,                           \
                                    &kDropoutDouble,   &kArgmaxDouble,       &kMathDouble};                          \
  constexpr Kernels<BFloat16> kBFloat16{&kGruBFloat16,          &kLstmBFloat16, &kAttentionBFloat16,                 \
                                        &kCrossEntropyBFloat16, &kGeluBFloat16, &kDropoutBFloat16};                  \
  }
// An instruction set for products of BFloat16; the rest is another's.
#define FASTLM_DECLARE_BFLOAT16_ISA(isa, rest)                                                                  \
  namespace isa {                                                                                               \
  extern const RecurrentKernels<BFloat16> kGruBFloat16, kLstmBFloat16;                                          \
  extern const AttentionKernels<BFloat16> kAttentionBFloat16;                                                   \
  extern const CrossEntropyKernels<BFloat16> kCrossEntropyBFloat16;                                             \
  constexpr Kernels<BFloat16> kBFloat16{&kGruBFloat16,          &kLstmBFloat16,       &kAttentionBFloat16,      \
                                        &kCrossEntropyBFloat16, &rest::kGeluBFloat16, &rest::kDropoutBFloat16}; \
  }
// The same with products of floats of its own.
#define FASTLM_DECLARE_SPLIT_ISA(isa, rest)                                                      \
  FASTLM_DECLARE_BFLOAT16_ISA(isa, rest)                                                         \
  namespace isa {                                                                                \
  extern const GemmKernels<float> kGemmFloat;                                                    \
  extern const RecurrentKernels<float> kGruFloat, kLstmFloat;                                    \
  extern const AttentionKernels<float> kAttentionFloat;                                          \
  extern const CrossEntropyKernels<float> kCrossEntropyFloat;                                    \
  constexpr Kernels<float> kFloat{&kGemmFloat,          &kGruFloat,          &kLstmFloat,        \
                                  &kAttentionFloat,     &kCrossEntropyFloat, &rest::kGeluFloat,  \
                                  &rest::kDropoutFloat, &rest::kArgmaxFloat, &rest::kMathFloat}; \
  }
FASTLM_DECLARE_ISA(scalar)
#if defined(__x86_64__)
FASTLM_DECLARE_ISA(avx2)
FASTLM_DECLARE_ISA(avx512)
FASTLM_DECLARE_BFLOAT16_ISA(avx512_bf16, avx512)
FASTLM_DECLARE_SPLIT_ISA(avx512_amx, avx512)
#endif
#ifdef FASTLM_WIDE_ISA
FASTLM_DECLARE_ISA(wide)
FASTLM_DECLARE_SPLIT_ISA(wide_amx, wide)
#endif

namespace {

struct Isa {
  const char* name;
  bool (*usable)();
  bool (*wanted)();  // where usable, but not asked for by name
  const Kernels<float>* kernels_float;
  const Kernels<double>* kernels_double;
  const Kernels<BFloat16>* kernels_bfloat16;
};

#if defined(__x86_64__)
// These builtins ask the operating system's state too, not only the CPU.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's cores take two cycles for a product of pairs and so are slower than with multiply-adds of floats.
bool has_fast_pairs() { return !__builtin_cpu_is("intel"); }
// Tile registers are a process's own only after it asked the system for them.
bool has_avx512_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kProducts = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kProducts) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
bool always() { return true; }

// Plainest first: the default is the last one usable and wanted; those for tests stand before avx2.
const Isa kIsas[] = {
    {"scalar", always, always, &scalar::kFloat, &scalar::kDouble, &scalar::kBFloat16},
#ifdef FASTLM_WIDE_ISA
    {"wide", has_avx2, always, &wide::kFloat, &wide::kDouble, &wide::kBFloat16},
    {"wide_amx", has_avx2, always, &wide_amx::kFloat, &wide::kDouble, &wide_amx::kBFloat16},
#endif
#if defined(__x86_64__)
    {"avx2", has_avx2, always, &avx2::kFloat, &avx2::kDouble, &avx2::kBFloat16},
    {"avx512", has_avx512, always, &avx512::kFloat, &avx512::kDouble, &avx512::kBFloat16},
    {"avx512_bf16", has_avx512_bf16, has_fast_pairs, &avx512::kFloat, &avx512::kDouble, &avx512_bf16::kBFloat16},
    {"avx512_amx", has_avx512_amx, always, &avx512_amx::kFloat, &avx512::kDouble, &avx512_amx::kBFloat16},
#endif
};

const Isa* choose(const std::string& name, const char* source) {
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (name.empty() ? !isa.wanted() : name != isa.name) continue;
    if (!isa.usable()) continue;
    best = &isa;
  }
  if (best) return best;
  std::string message = std::string(source) + ": expected one of";
  for (const auto& usable : usable_isas()) message += " " + usable;
  throw std::invalid_argument(message + ", got " + name);
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{[] {
    const char* forced = std::getenv("FASTLM_CPU_ISA");
    return choose(forced ? forced : "", "FASTLM_CPU_ISA");
  }()};
  return isa;
}

}  // namespace

template <>
const Kernels<float>& kernels() {
  return *current().load(std::memory_order_relaxed)->kernels_float;
}
template <>
const Kernels<double>& kernels() {
  return *current().load(std::memory_order_relaxed)->kernels_double;
}

template <>
const Kernels<BFloat16>& kernels() {
  return *current().load(std::memory_order_relaxed)->kernels_bfloat16;
}

std::string isa() { return current().load()->name; }

void set_isa(const std::string& name) {
  if (name.empty()) throw std::invalid_argument("set_cpu_isa: expected a name, got an empty string");
  current().store(choose(name, "set_cpu_isa"));
}

bool outruns_mkl() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel") && current().load(std::memory_order_relaxed)->kernels_float == &avx512::kFloat;
#else
  return false;
#endif
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.usable()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.push_back(isa.name);
  return names;
}

}  // namespace fastlm::cpu
