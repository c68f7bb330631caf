#include "cpu/attention.h"

#include "bindings/common.h"
#include "core/params.h"

namespace fastlm::bindings {
namespace {

// Dimensions of q, k, v and what has their shape: (B, H, T, D), or packed (rows, H, D).
struct Dims {
  bool packed;
  int64_t batch(const Tensor& t) const { return packed ? 1 : t.size(0); }
  int64_t heads(const Tensor& t) const { return t.size(1); }
  int64_t rows(const Tensor& t) const { return t.size(packed ? 0 : 2); }
  int64_t width(const Tensor& t) const { return t.size(packed ? 2 : 3); }
  Shape shape(int64_t batch, int64_t heads, int64_t rows, int64_t width) const {
    return packed ? Shape{rows, heads, width} : Shape{batch, heads, rows, width};
  }
  template <class P>
  Heads<P> view(const Tensor& t) const {
    auto* data = static_cast<std::remove_const_t<P>*>(const_cast<void*>(t.const_data_ptr()));
    return {data, packed ? 0 : t.stride(0), t.stride(1), t.stride(packed ? 0 : 2)};
  }
};

// An input whose rows the kernel reads in place: any strides but the last.
Tensor with_rows(const Tensor& tensor, const char* name, const Shape& shape, ScalarType dtype) {
  check(tensor, name, shape, dtype);
  const int64_t last = shape.count - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

// A result in the order of dimensions that `like` has in memory: heads may be the inner ones.
Tensor empty_heads(const Tensor& like, const Dims& dims, const Shape& shape) {
  if (dims.packed || like.stride(1) >= like.stride(2)) return empty(like, shape);
  const int64_t width = shape.sizes[3], row = shape.sizes[1] * width;
  const int64_t strides[] = {std::max<int64_t>(shape.sizes[2], 1) * std::max<int64_t>(row, 1),
                             std::max<int64_t>(width, 1), std::max<int64_t>(row, 1), 1};
  return empty_strided(like, shape.count, shape.sizes, strides, like.scalar_type());
}

// What broadcasts against (B, Hq, Tq, Tk).
template <class P, class Full>
AttentionMask<P> mask_view(const OptionalTensor& mask, const char* name, ScalarType dtype, const Full& full) {
  if (!mask) return {};
  check(mask->dim() == 4 && mask->is_cpu() && mask->scalar_type() == dtype,
        (name + std::string(": expected a CPU tensor of 4 dimensions and the right dtype")).c_str());
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    if (mask->size(i) != 1 && mask->size(i) != full[i])
      fail(name + std::string(": expected size 1 or ") + std::to_string(full[i]) + " in dimension " +
           std::to_string(i) + ", got " + std::to_string(mask->size(i)));
    strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  auto* data = static_cast<std::remove_const_t<P>*>(const_cast<void*>(mask->const_data_ptr()));
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

// Where packed sequences start: from 0, never falling, within the rows. Returns the longest.
int64_t check_starts(const Tensor& starts, const char* name, int64_t rows) {
  const auto* at = static_cast<const int64_t*>(starts.const_data_ptr());
  const int64_t count = starts.size(0);
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t least = i == 0 ? 0 : at[i - 1], most = i == 0 ? 0 : rows;
    if (at[i] < least || at[i] > most)
      fail(name + std::string(": expected rising numbers from 0 to at most ") + std::to_string(rows) + ", got " +
           std::to_string(at[i]) + " at index " + std::to_string(i));
    if (i > 0) longest = std::max(longest, at[i] - at[i - 1]);
  }
  return longest;
}

// The inputs of a call, checked, and what the kernel is told of them.
class AttentionCall {
 public:
  AttentionCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& keep_in,
                const OptionalTensor& bias_in, const OptionalTensor& slopes_in, const OptionalTensor& kv_lengths_in,
                const OptionalTensor& q_starts_in, const OptionalTensor& k_starts_in, const OptionalTensor& seed_in)
      : dims{q_starts_in.has_value()}, dtype(q_in.scalar_type()), keep(keep_in), bias(bias_in), slopes(slopes_in) {
    const int64_t rank = dims.packed ? 3 : 4;
    check(q_in.dim() == rank && k_in.dim() == rank && v_in.dim() == rank, "q, k, v: wrong number of dimensions");
    check(k_starts_in.has_value() == dims.packed, "k_starts: expected together with q_starts");
    batch = dims.batch(q_in), q_heads = dims.heads(q_in), q_rows = dims.rows(q_in), dim = dims.width(q_in);
    kv_heads = dims.heads(k_in), k_rows = dims.rows(k_in), v_dim = dims.width(v_in);
    check(kv_heads > 0 ? q_heads % kv_heads == 0 : q_heads == 0, "q: expected a multiple of the heads of k");
    q = with_rows(q_in, "q", dims.shape(batch, q_heads, q_rows, dim), dtype);
    k = with_rows(k_in, "k", dims.shape(batch, kv_heads, k_rows, dim), dtype);
    v = with_rows(v_in, "v", dims.shape(batch, kv_heads, k_rows, v_dim), dtype);
    q_len = q_rows, k_len = k_rows;
    if (dims.packed) take_starts(*q_starts_in, *k_starts_in);
    if (kv_lengths_in) take_lengths(*kv_lengths_in);
    if (seed_in) {
      const Tensor checked = dense(*seed_in, "seed", {}, ScalarType::Long);
      seed = *static_cast<const int64_t*>(checked.const_data_ptr());
    }
  }

  Shape lse_shape() const { return dims.packed ? Shape{q_heads, q_rows} : Shape{batch, q_heads, q_rows}; }
  // Strides of what has that shape and is dense; packed sequences begin at their first row.
  template <class P>
  Heads<P> lse_view(const Tensor& lse) const {
    auto* data = static_cast<std::remove_const_t<P>*>(const_cast<void*>(lse.const_data_ptr()));
    return {data, dims.packed ? 0 : q_heads * q_rows, q_rows, 1};
  }
  // Whether a kernel leaves rows of k's shape (q's shape) unwritten.
  bool skips_keys() const { return kv_lengths.has_value() || (dims.packed && last(*k_starts) < k_rows); }
  bool skips_queries() const { return dims.packed && last(*q_starts) < q_rows; }

  template <class S>
  void fill(AttentionParams<S>& p, double scale, double softcap, double dropout, bool lower_right, int64_t left,
            int64_t right) const {
    using T = Compute<S>;
    p.batch = dims.packed ? sequences : batch, p.q_heads = q_heads, p.kv_heads = kv_heads;
    p.q_len = q_len, p.k_len = k_len, p.dim = dim, p.v_dim = v_dim;
    p.q_starts = read<int64_t>(q_starts), p.k_starts = read<int64_t>(k_starts);
    p.kv_lengths = read<int64_t>(kv_lengths);
    p.q = dims.view<const S>(q), p.k = dims.view<const S>(k), p.v = dims.view<const S>(v);
    const int64_t full[] = {p.batch, q_heads, q_len, k_len}, per_head[] = {p.batch, q_heads, 1, 1};
    check(!dims.packed || (!keep && !bias), "mask: expected none for packed sequences");
    p.keep = mask_view<const bool>(keep, "keep", ScalarType::Bool, full);
    p.bias = mask_view<const S>(bias, "bias", dtype, full);
    p.slopes = mask_view<const T>(slopes, "slopes", compute_type(dtype), per_head);
    p.scale = static_cast<T>(scale), p.softcap = static_cast<T>(softcap);
    // So that sums with positions cannot overflow; no sequence is that long.
    constexpr int64_t kFar = int64_t{1} << 60;
    p.lower_right = lower_right, p.left = std::min(left, kFar), p.right = std::min(right, kFar);
    p.dropout = dropout, p.seed = seed;
  }

  const Dims dims;
  const ScalarType dtype;
  const OptionalTensor keep, bias, slopes;
  int64_t batch, q_heads, kv_heads, q_rows, k_rows, q_len, k_len, dim, v_dim, sequences = 0, seed = 0;
  Tensor q, k, v;
  OptionalTensor q_starts, k_starts, kv_lengths;

 private:
  static int64_t last(const Tensor& starts) {
    return static_cast<const int64_t*>(starts.const_data_ptr())[starts.size(0) - 1];
  }
  void take_starts(const Tensor& q_in, const Tensor& k_in) {
    check(q_in.dim() == 1 && q_in.size(0) > 0, "q_starts: expected 1 dimension (B + 1)");
    sequences = q_in.size(0) - 1;
    q_starts = dense(q_in, "q_starts", {sequences + 1}, ScalarType::Long);
    k_starts = dense(k_in, "k_starts", {sequences + 1}, ScalarType::Long);
    q_len = check_starts(*q_starts, "cu_seqlens_q", q_rows);
    k_len = check_starts(*k_starts, "cu_seqlens_k", k_rows);
  }
  void take_lengths(const Tensor& lengths) {
    check(!dims.packed, "kv_lengths: expected none for packed sequences");
    kv_lengths = dense(lengths, "kv_lengths", {batch}, ScalarType::Long);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = read<int64_t>(kv_lengths)[b];
      if (length < 0 || length > k_len)
        fail("kv_lengths: expected numbers from 0 to " + std::to_string(k_len) + ", got " + std::to_string(length) +
             " at index " + std::to_string(b));
    }
  }
};

void fill_zero(const Tensor& dense_tensor) {
  const auto bytes = static_cast<size_t>(dense_tensor.numel()) * dense_tensor.element_size();
  if (bytes) std::memset(dense_tensor.mutable_data_ptr(), 0, bytes);
}

// run(params) with what forward makes of a call, but for weights.
template <class Run>
std::tuple<Tensor, Tensor> attend(const Tensor& q, const AttentionCall& call, double scale, double softcap,
                                  double dropout, bool lower_right, int64_t left, int64_t right, const Run& run) {
  const Tensor output = empty_heads(q, call.dims, call.dims.shape(call.batch, call.q_heads, call.q_rows, call.v_dim));
  const Tensor lse = empty(q, call.lse_shape(), compute_type(call.dtype));
  if (call.skips_queries()) {
    fill_zero(output);
    fill_zero(lse);
  }
  dispatch_with_bfloat16(call.dtype, "attention_forward", [&](auto zero) {
    using S = decltype(zero);
    AttentionForwardParams<S> p{};
    call.fill(p, scale, softcap, dropout, lower_right, left, right);
    p.output = call.dims.view<S>(output), p.lse = call.lse_view<Compute<S>>(lse);
    run(p);
    cpu::attention_forward(p, max_threads(), parallel_for);
  });
  return {output, lse};
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             int64_t right, const OptionalTensor& keep, const OptionalTensor& bias,
                                             const OptionalTensor& slopes, const OptionalTensor& kv_lengths,
                                             const OptionalTensor& q_starts, const OptionalTensor& k_starts,
                                             const OptionalTensor& seed, double softcap, double dropout,
                                             bool lower_right, int64_t left) {
  const AttentionCall call(q, k, v, keep, bias, slopes, kv_lengths, q_starts, k_starts, seed);
  return attend(q, call, scale, softcap, dropout, lower_right, left, right, [](auto&) {});
}

std::tuple<Tensor, Tensor, Tensor> attention_weights_forward(
    const Tensor& q, const Tensor& k, const Tensor& v, bool average, double scale, int64_t right,
    const OptionalTensor& keep, const OptionalTensor& bias, const OptionalTensor& slopes,
    const OptionalTensor& kv_lengths, const OptionalTensor& q_starts, const OptionalTensor& k_starts,
    const OptionalTensor& seed, double softcap, double dropout, bool lower_right, int64_t left) {
  check(!q_starts && !k_starts, "q_starts: expected none, for packed sequences give no weights");
  const AttentionCall call(q, k, v, keep, bias, slopes, kv_lengths, q_starts, k_starts, seed);
  const Tensor weights = average ? empty(q, {call.batch, call.q_rows, call.k_rows})
                                 : empty(q, {call.batch, call.q_heads, call.q_rows, call.k_rows});
  if (average && call.q_heads == 0) fill_zero(weights);
  const auto [output, lse] = attend(q, call, scale, softcap, dropout, lower_right, left, right, [&](auto& p) {
    p.weights = static_cast<decltype(p.weights)>(weights.mutable_data_ptr()), p.average = average;
  });
  return {output, lse, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output_in, const OptionalTensor& grad_lse_in, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& output_in, const Tensor& lse_in, double scale, int64_t right, const OptionalTensor& keep,
    const OptionalTensor& bias, const OptionalTensor& slopes, const OptionalTensor& kv_lengths,
    const OptionalTensor& q_starts, const OptionalTensor& k_starts, const OptionalTensor& seed, double softcap,
    double dropout, bool lower_right, int64_t left, bool need_bias) {
  const AttentionCall call(q, k, v, keep, bias, slopes, kv_lengths, q_starts, k_starts, seed);
  const Shape rows = call.dims.shape(call.batch, call.q_heads, call.q_rows, call.v_dim);
  const ScalarType compute = compute_type(call.dtype);
  const Tensor grad_output = with_rows(grad_output_in, "grad_output", rows, call.dtype);
  const Tensor output = with_rows(output_in, "output", rows, call.dtype);
  const Tensor lse = dense(lse_in, "lse", call.lse_shape(), compute);
  const auto grad_lse = dense(grad_lse_in, "grad_lse", call.lse_shape(), compute);
  const Tensor grad_q = empty_heads(q, call.dims, call.dims.shape(call.batch, call.q_heads, call.q_rows, call.dim));
  const Tensor grad_k = empty_heads(k, call.dims, call.dims.shape(call.batch, call.kv_heads, call.k_rows, call.dim));
  const Tensor grad_v = empty_heads(v, call.dims, call.dims.shape(call.batch, call.kv_heads, call.k_rows, call.v_dim));
  check(!need_bias || bias, "need_bias: expected a bias");
  Tensor grad_bias = empty(q, {0}, compute);
  if (need_bias) {
    grad_bias = empty(q, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, compute);
    fill_zero(grad_bias);
  }
  if (call.skips_keys()) {
    fill_zero(grad_k);
    fill_zero(grad_v);
  }
  if (call.skips_queries()) fill_zero(grad_q);
  dispatch_with_bfloat16(call.dtype, "attention_backward", [&](auto zero) {
    using S = decltype(zero);
    using T = Compute<S>;
    AttentionBackwardParams<S> p{};
    call.fill(p, scale, softcap, dropout, lower_right, left, right);
    p.grad_output = call.dims.view<const S>(grad_output), p.output = call.dims.view<const S>(output);
    p.lse = call.lse_view<const T>(lse);
    if (grad_lse) p.grad_lse = call.lse_view<const T>(*grad_lse);
    p.grad_q = call.dims.view<S>(grad_q), p.grad_k = call.dims.view<S>(grad_k), p.grad_v = call.dims.view<S>(grad_v);
    const int64_t full[] = {p.batch, call.q_heads, call.q_len, call.k_len};
    if (need_bias) p.grad_bias = mask_view<T>(grad_bias, "grad_bias", compute, full);
    p.grad_bias_numbers = grad_bias.numel();
    cpu::attention_backward(p, max_threads(), parallel_for);
  });
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace fastlm::bindings

STABLE_TORCH_LIBRARY_IMPL(fastlm, CPU, library) {
  library.impl("attention_forward", TORCH_BOX(&fastlm::bindings::attention_forward));
  library.impl("attention_weights_forward", TORCH_BOX(&fastlm::bindings::attention_weights_forward));
  library.impl("attention_backward", TORCH_BOX(&fastlm::bindings::attention_backward));
}
