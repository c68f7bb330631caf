#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastlm::cpu {

#define FASTLM_DECLARE_ISA(isa)                                                                                     \
  namespace isa {                                                                                                   \
  extern const GemmKernels<float> kGemmFloat;                                                                       \
  extern const GemmKernels<double> kGemmDouble;                                                                     \
  extern const RecurrentKernels<float> kGruFloat, kLstmFloat;                                                       \
  extern const RecurrentKernels<double> kGruDouble, kLstmDouble;                                                    \
  extern const RecurrentKernels<BFloat16> kGruBFloat16, kLstmBFloat16;                                              \
  extern const AttentionKernels<float> kAttentionFloat;                                                             \
  extern const AttentionKernels<double> kAttentionDouble;                                                           \
  extern const AttentionKernels<BFloat16> kAttentionBFloat16;                                                       \
  extern const CrossEntropyKernels<float> kCrossEntropyFloat;                                                       \
  extern const CrossEntropyKernels<double> kCrossEntropyDouble;                                                     \
  extern const CrossEntropyKernels<BFloat16> kCrossEntropyBFloat16;                                                 \
  extern const GeluKernels<float> kGeluFloat;                                                                       \
  extern const GeluKernels<double> kGeluDouble;                                                                     \
  extern const GeluKernels<BFloat16> kGeluBFloat16;                                                                 \
  extern const ArgmaxKernels<float> kArgmaxFloat;                                                                   \
  extern const ArgmaxKernels<double> kArgmaxDouble;                                                                 \
  extern const MathKernels<float> kMathFloat;                                                                       \
  extern const MathKernels<double> kMathDouble;                                                                     \
  constexpr Kernels<float> kFloat{&kGemmFloat,         &kGruFloat,  &kLstmFloat,   &kAttentionFloat,                \
                                  &kCrossEntropyFloat, &kGeluFloat, &kArgmaxFloat, &kMathFloat};                    \
  constexpr Kernels<double> kDouble{&kGemmDouble,         &kGruDouble,  &kLstmDouble,   &kAttentionDouble,          \
                                    &kCrossEntropyDouble, &kGeluDouble, &kArgmaxDouble, &kMathDouble};              \
  constexpr Kernels<BFloat16> kBFloat16{&kGruBFloat16, &kLstmBFloat16, &kAttentionBFloat16, &kCrossEntropyBFloat16, \
                                        &kGeluBFloat16};                                                            \
  }
FASTLM_DECLARE_ISA(scalar)
#if defined(__x86_64__)
FASTLM_DECLARE_ISA(avx2)
FASTLM_DECLARE_ISA(avx512)
namespace avx512_bf16 {
extern const AttentionKernels<BFloat16> kAttentionBFloat16;
constexpr Kernels<BFloat16> kBFloat16{&avx512::kGruBFloat16, &avx512::kLstmBFloat16, &kAttentionBFloat16,
                                      &avx512::kCrossEntropyBFloat16, &avx512::kGeluBFloat16};
}  // namespace avx512_bf16
#endif
#ifdef FASTLM_WIDE_ISA
FASTLM_DECLARE_ISA(wide)
#endif

namespace {

struct Isa {
  const char* name;
  bool (*usable)();
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
#endif

// Plainest first: the default is the last usable one that is not for tests.
const Isa kIsas[] = {
    {"scalar", [] { return true; }, &scalar::kFloat, &scalar::kDouble, &scalar::kBFloat16},
#ifdef FASTLM_WIDE_ISA
    {"wide", has_avx2, &wide::kFloat, &wide::kDouble, &wide::kBFloat16},
#endif
#if defined(__x86_64__)
    {"avx2", has_avx2, &avx2::kFloat, &avx2::kDouble, &avx2::kBFloat16},
    {"avx512", has_avx512, &avx512::kFloat, &avx512::kDouble, &avx512::kBFloat16},
    {"avx512_bf16", has_avx512_bf16, &avx512::kFloat, &avx512::kDouble, &avx512_bf16::kBFloat16},
#endif
};

const Isa* choose(const std::string& name, const char* source) {
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (!isa.usable() || (!name.empty() && name != isa.name)) continue;
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
