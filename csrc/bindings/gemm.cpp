#include "cpu/gemm.h"

#include "bindings/common.h"

namespace fastlm::bindings {
namespace {

Tensor gemm(const Tensor& a_in, const Tensor& b_in, bool transpose_a, bool transpose_b, const OptionalTensor& bias_in) {
  check(a_in.dim() == 2 && b_in.dim() == 2, "gemm: expected two matrices");
  const auto dtype = a_in.scalar_type();
  const Tensor a = dense(a_in, "a", {a_in.size(0), a_in.size(1)}, dtype);
  const Tensor b = dense(b_in, "b", {b_in.size(0), b_in.size(1)}, dtype);
  const int64_t m = a.size(transpose_a ? 1 : 0), k = a.size(transpose_a ? 0 : 1), n = b.size(transpose_b ? 0 : 1);
  const int64_t b_k = b.size(transpose_b ? 1 : 0);
  if (b_k != k) fail("gemm: b: expected inner size " + std::to_string(k) + " (that of a), got " + std::to_string(b_k));
  const OptionalTensor bias = dense(bias_in, "bias", {n}, dtype);
  const Tensor c = empty(a, {m, n});
  dispatch(dtype, "gemm", [&](auto zero) {
    using T = decltype(zero);
    cpu::gemm(GemmParams<T>{m, n, k, read<T>(a), a.size(1), transpose_a, read<T>(b), b.size(1), transpose_b,
                            write<T>(c), n, false, read<T>(bias)},
              max_threads(), parallel_for);
  });
  return c;
}

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) { library.impl("gemm", TORCH_BOX(&fastlm::bindings::gemm)); }
