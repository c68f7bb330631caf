// Runs every kernel of csrc/cpu without torch, for `make sanitize`: on threads that the sanitizers see from their first
// instruction (torch's pool is not built with them), every tensor in a heap block of its own size, so that a read past
// an end is one past the block's. Each call must give the bits of one thread, whatever the pool does.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/gates.h"
#include "cpu/argmax.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/dropout.h"
#include "cpu/gelu.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/recurrent.h"
#include "cpu/sequences.h"
#include "cpu/stream.h"

namespace {

using namespace fastlm;

void run_on_threads(int64_t begin, int64_t end, cpu::ParallelBody body, void* context, int late) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i)
    pool.emplace_back([=] {
      if (i == late) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      body(i, i + 1, context);
    });
  for (auto& thread : pool) thread.join();
}

struct Pool {
  const char* name;
  int threads;
  cpu::ParallelFor run;
};
const Pool kPools[] = {
    {"one thread", 1, nullptr},
    {"two threads", 2, [](int64_t b, int64_t e, cpu::ParallelBody f, void* c) { run_on_threads(b, e, f, c, -1); }},
    {"five threads", 5, [](int64_t b, int64_t e, cpu::ParallelBody f, void* c) { run_on_threads(b, e, f, c, -1); }},
    {"one comes late", 3, [](int64_t b, int64_t e, cpu::ParallelBody f, void* c) { run_on_threads(b, e, f, c, 1); }},
    {"one after another", 3,
     [](int64_t b, int64_t e, cpu::ParallelBody f, void* c) {
       for (int64_t i = b; i < e; ++i) f(i, i + 1, c);
     }},
    {"all in one chunk", 4, [](int64_t b, int64_t e, cpu::ParallelBody f, void* c) { f(b, e, c); }},
};

std::mt19937 generator(1);

// Small values, so that 200 steps stay finite.
template <class S>
std::vector<S> random(int64_t n) {
  std::uniform_real_distribution<float> value(-0.1f, 0.1f);
  std::vector<S> made(n);
  for (auto& v : made)
    if constexpr (std::is_same_v<S, BFloat16>) {
      const float drawn = value(generator);
      uint32_t bits;
      std::memcpy(&bits, &drawn, sizeof(bits));
      v.bits = static_cast<uint16_t>(bits >> 16);
    } else {
      v = value(generator);
    }
  return made;
}

using Bytes = std::vector<std::vector<char>>;  // results, to be compared bit by bit
template <class S>
void add(Bytes& results, const std::vector<S>& values) {
  const auto* begin = reinterpret_cast<const char*>(values.data());
  results.emplace_back(begin, begin + values.size() * sizeof(S));
}

struct Shape {
  int64_t seq_len, batch, input_size, hidden;
};
enum class Form { kWhole, kLengths, kPacked };

// How many rows x has, and which sequences they make up.
struct Rows {
  std::optional<cpu::Sequences> sequences;
  Ragged ragged{};
  int64_t count;
  std::unique_ptr<bool[]> resets;

  Rows(const Shape& s, Form form, bool with_resets) : count(s.seq_len * s.batch) {
    std::vector<int64_t> lengths(s.batch);
    for (auto& length : lengths) length = generator() % (s.seq_len + 1);
    if (form == Form::kLengths) sequences = cpu::Sequences::padded(lengths.data(), s.batch, s.seq_len);
    if (form == Form::kPacked && s.batch > 0) {
      std::vector<int64_t> sizes(s.seq_len);
      count = 0;
      for (int64_t t = 0; t < s.seq_len; ++t) count += sizes[t] = std::max<int64_t>(1, s.batch - t / 2);
      sequences = cpu::Sequences::packed(sizes.data(), s.seq_len, count);
    }
    if (sequences) ragged = sequences->view();
    if (with_resets && form != Form::kPacked) {
      resets.reset(new bool[count]);
      for (int64_t i = 0; i < count; ++i) resets[i] = generator() % 4 == 0;
    }
  }
  template <class Params>
  void fill(Params& p, const Shape& s) const {
    p.seq_len = s.seq_len, p.batch = s.batch, p.input_size = s.input_size, p.hidden = s.hidden;
    p.ragged = sequences ? &ragged : nullptr;
    p.resets = resets.get();
  }
};

// Outputs of forward and every gradient of backward; `optional`: with all that may be missing.
template <class S>
Bytes recurrent(bool lstm, const Shape& s, Form form, bool reverse, bool optional, const Pool& pool) {
  using T = Compute<S>;
  generator.seed(static_cast<unsigned>(s.seq_len * 1000 + s.hidden));
  const Rows rows(s, form, optional);
  const int64_t gates = (lstm ? int{kLstmGates} : int{kGruGates}) * s.hidden, state = s.batch * s.hidden;
  const int64_t kept = lstm ? int{kLstmReserve} : int{kGruReserve};
  const auto x = random<S>(rows.count * s.input_size), h0 = random<S>(state), c0 = random<S>(state);
  const auto w_ih = random<S>(gates * s.input_size), w_hh = random<S>(gates * s.hidden);
  const auto b_ih = random<S>(gates), b_hh = random<S>(gates);
  const auto grad_output = random<S>(rows.count * s.hidden), grad_cells = random<S>(rows.count * s.hidden);
  const auto grad_h_n = random<S>(state), grad_c_n = random<S>(state);
  const auto given = [&](const std::vector<S>& values) { return optional ? values.data() : nullptr; };

  std::vector<S> output(rows.count * s.hidden), cells(output.size()), h_n(state), c_n(state);
  std::vector<T> reserve(rows.count * kept * s.hidden);
  RecurrentForwardParams<S> f{};
  rows.fill(f, s);
  f.x = x.data(), f.h0 = given(h0), f.c0 = given(c0), f.w_ih = w_ih.data(), f.w_hh = w_hh.data();
  f.b_ih = given(b_ih), f.b_hh = given(b_hh), f.reverse = reverse;
  f.output = output.data(), f.cells = lstm && optional ? cells.data() : nullptr;
  f.h_n = h_n.data(), f.c_n = c_n.data(), f.reserve = reserve.data();
  (lstm ? cpu::lstm_forward<S> : cpu::gru_forward<S>)(f, pool.threads, pool.run);

  std::vector<S> grad_x(x.size()), grad_h0(state), grad_c0(state);
  std::vector<S> grad_w_ih(w_ih.size()), grad_w_hh(w_hh.size()), grad_b_ih(gates), grad_b_hh(gates);
  RecurrentBackwardParams<S> b{};
  rows.fill(b, s);
  b.grad_output = grad_output.data(), b.grad_cells = lstm ? given(grad_cells) : nullptr;
  b.grad_h_n = given(grad_h_n), b.grad_c_n = given(grad_c_n);
  b.x = x.data(), b.w_ih = w_ih.data(), b.w_hh = w_hh.data(), b.reserve = reserve.data(), b.reverse = reverse;
  b.grad_x = optional ? grad_x.data() : nullptr, b.grad_h0 = optional ? grad_h0.data() : nullptr;
  b.grad_c0 = optional && lstm ? grad_c0.data() : nullptr;
  b.grad_w_ih = grad_w_ih.data(), b.grad_w_hh = grad_w_hh.data(), b.grad_b_ih = grad_b_ih.data();
  b.grad_b_hh = lstm ? nullptr : grad_b_hh.data();
  (lstm ? cpu::lstm_backward<S> : cpu::gru_backward<S>)(b, pool.threads, pool.run);
  Bytes results;
  for (const auto& values :
       {output, cells, h_n, c_n, grad_x, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh})
    add(results, values);
  return results;
}

// Steps, a chunk, and steps of a clone whose original is gone.
template <class S>
Bytes stream(bool lstm, int64_t batch, int64_t input_size, int64_t hidden, bool bfloat16_weights, const Pool& pool) {
  generator.seed(static_cast<unsigned>(batch + hidden));
  constexpr int64_t kLayers = 3, kSteps = 5;
  const int64_t gates = (lstm ? int{kLstmGates} : int{kGruGates}) * hidden;
  const auto x = random<S>(2 * kSteps * batch * input_size);
  const auto w_ih = random<S>(gates * std::max(input_size, hidden)), w_hh = random<S>(gates * hidden);
  const auto bias = random<S>(gates);
  const std::vector<cpu::StreamWeights<S>> layers(kLayers, {w_ih.data(), w_hh.data(), bias.data(), nullptr});
  auto made = cpu::Stream<S>::make(lstm, {batch, input_size, hidden, kLayers, bfloat16_weights, layers.data()});
  std::vector<S> output(2 * kSteps * batch * hidden), h(kLayers * batch * hidden);
  std::vector<Compute<S>> c(h.size());
  const auto run = [&](int64_t step, int64_t steps) {
    made->run(x.data() + step * batch * input_size, output.data() + step * batch * hidden, steps, pool.threads,
              pool.run);
  };
  run(0, 1), run(1, 1), run(2, kSteps);
  made.reset(made->clone());
  made->reset(batch - 1);
  run(kSteps + 2, 1);
  made->read_state(h.data(), c.data());
  made->write_state(h.data(), c.data());
  run(kSteps + 3, kSteps - 3);
  Bytes results;
  add(results, output), add(results, h), add(results, c);
  return results;
}

template <class T>
Bytes product(int64_t m, int64_t n, int64_t k, bool transpose_a, bool transpose_b, const Pool& pool) {
  generator.seed(static_cast<unsigned>(m + n + k));
  const auto a = random<T>(m * k), b = random<T>(k * n), bias = random<T>(n);
  std::vector<T> c(m * n);
  cpu::gemm(GemmParams<T>{m, n, k, a.data(), transpose_a ? m : k, transpose_a, b.data(), transpose_b ? k : n,
                          transpose_b, c.data(), n, false, m % 2 ? bias.data() : nullptr},
            pool.threads, pool.run);
  Bytes results;
  add(results, c);
  return results;
}

// Attention over heads that share keys, with the options that the bits of `options` switch on. Packed rows have no
// mask: with its bit some of them follow the last sequence.
struct AttentionSizes {
  int64_t batch, q_heads, kv_heads, q_len, k_len, dim, v_dim;
};
enum : int { kCausal = 1, kWindow = 2, kMask = 4, kBias = 8, kExtras = 16, kPackedRows = 32, kAttentionOptions = 64 };

template <class S>
Bytes attention(const AttentionSizes& s, int options, const Pool& pool) {
  using T = Compute<S>;
  generator.seed(static_cast<unsigned>(s.q_len * 1000 + s.k_len));
  const bool packed = options & kPackedRows;
  const int64_t q_rows = s.batch * s.q_len, k_rows = s.batch * s.k_len, scores = q_rows * s.q_heads * s.k_len;
  const auto q = random<S>(q_rows * s.q_heads * s.dim), k = random<S>(k_rows * s.kv_heads * s.dim);
  const auto v = random<S>(k_rows * s.kv_heads * s.v_dim), grad = random<S>(q_rows * s.q_heads * s.v_dim);
  const auto bias = random<S>(s.q_heads * s.q_len * s.k_len);
  const auto slopes = random<T>(s.q_heads), grad_lse = random<T>(q_rows * s.q_heads);
  const std::unique_ptr<bool[]> keep(new bool[scores]);
  for (int64_t i = 0; i < scores; ++i) keep[i] = i % 97 < 80 || generator() % 3 == 0;  // whole stretches, too
  std::vector<int64_t> q_starts(s.batch + 1, q_rows), k_starts(s.batch + 1, k_rows), lengths(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) {
    q_starts[b] = b == 0 ? 0 : std::min(q_rows, q_starts[b - 1] + static_cast<int64_t>(generator() % s.q_len));
    k_starts[b] = b == 0 ? 0 : std::min(k_rows, k_starts[b - 1] + static_cast<int64_t>(generator() % (s.k_len + 1)));
    lengths[b] = static_cast<int64_t>(generator() % (s.k_len + 1));
  }
  if (options & kMask) {
    q_starts[s.batch] = std::max(q_starts[s.batch - 1], q_rows - 7);
    k_starts[s.batch] = std::max(k_starts[s.batch - 1], k_rows - 7);
  }
  // (B, T, H, D): heads are the inner dimension, as projections leave them.
  const auto heads = [&](auto* data, int64_t count, int64_t rows, int64_t width) {
    return Heads<std::remove_pointer_t<decltype(data)>>{data, packed ? 0 : rows * count * width, width, count * width};
  };
  const auto fill = [&](AttentionParams<S>& p) {
    p.batch = s.batch, p.q_heads = s.q_heads, p.kv_heads = s.kv_heads, p.dim = s.dim, p.v_dim = s.v_dim;
    p.q_len = s.q_len, p.k_len = s.k_len;
    if (packed) {
      p.q_starts = q_starts.data(), p.k_starts = k_starts.data();
      for (int64_t b = 0; b < s.batch; ++b) {
        p.q_len = std::max(p.q_len, q_starts[b + 1] - q_starts[b]);
        p.k_len = std::max(p.k_len, k_starts[b + 1] - k_starts[b]);
      }
    }
    p.q = heads(q.data(), s.q_heads, s.q_len, s.dim), p.k = heads(k.data(), s.kv_heads, s.k_len, s.dim);
    p.v = heads(v.data(), s.kv_heads, s.k_len, s.v_dim);
    p.scale = T(0.5), p.left = options & kWindow ? 20 : -1, p.right = options & (kCausal | kWindow) ? 0 : -1;
    p.lower_right = options & kCausal;
    if (options & kMask && !packed) p.keep = {keep.get(), s.q_heads * s.q_len * s.k_len, s.q_len * s.k_len, s.k_len, 1};
    if (options & kBias && !packed) p.bias = {bias.data(), 0, s.q_len * s.k_len, s.k_len, 1};
    if (!(options & kExtras)) return;
    p.slopes = {slopes.data(), 0, 1, 0, 0}, p.softcap = T(2), p.dropout = 0.25, p.seed = 42;
    if (!packed) p.kv_lengths = lengths.data();
  };

  std::vector<S> output(grad.size()), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  std::vector<T> lse(grad_lse.size()), grad_bias(bias.size());
  const int64_t lse_batch = packed ? 0 : s.q_heads * s.q_len, lse_head = packed ? q_rows : s.q_len;
  AttentionForwardParams<S> f{};
  fill(f);
  f.output = heads(output.data(), s.q_heads, s.q_len, s.v_dim), f.lse = {lse.data(), lse_batch, lse_head, 1};
  cpu::attention_forward(f, pool.threads, pool.run);
  std::vector<S> weights[2];  // of every head, and their average
  for (const bool average : {false, true}) {
    if (packed) break;
    weights[average].resize(average ? scores / s.q_heads : scores);
    f.weights = weights[average].data(), f.average = average;
    cpu::attention_forward(f, pool.threads, pool.run);
  }
  AttentionBackwardParams<S> b{};
  fill(b);
  b.grad_output = heads(grad.data(), s.q_heads, s.q_len, s.v_dim);
  b.output = heads(static_cast<const S*>(output.data()), s.q_heads, s.q_len, s.v_dim);
  b.lse = {lse.data(), lse_batch, lse_head, 1};
  if (options & kExtras) b.grad_lse = {grad_lse.data(), lse_batch, lse_head, 1};
  b.grad_q = heads(grad_q.data(), s.q_heads, s.q_len, s.dim),
  b.grad_k = heads(grad_k.data(), s.kv_heads, s.k_len, s.dim);
  b.grad_v = heads(grad_v.data(), s.kv_heads, s.k_len, s.v_dim);
  if (b.bias.data) b.grad_bias = {grad_bias.data(), 0, s.q_len * s.k_len, s.k_len, 1};
  b.grad_bias_numbers = b.bias.data ? static_cast<int64_t>(grad_bias.size()) : 0;
  cpu::attention_backward(b, pool.threads, pool.run);
  Bytes results;
  for (const auto& values : {output, grad_q, grad_k, grad_v, weights[0], weights[1]}) add(results, values);
  add(results, lse), add(results, grad_bias);
  return results;
}

// The output layer with its loss, every third row without a target or all with one; forward, or backward from forward's
// statistics.
struct OutputSizes {
  int64_t rows, vocab, dim;
};
enum : int { kWithBias = 1, kSmoothing = 2, kBackward = 4, kAllGradients = 8, kEveryRow = 16, kOutputOptions = 32 };

template <class S>
Bytes output_layer(const OutputSizes& s, int options, const Pool& pool) {
  using T = Compute<S>;
  generator.seed(static_cast<unsigned>(s.rows * 1000 + s.vocab));
  const auto hidden = random<S>(s.rows * s.dim), weight = random<S>(s.vocab * s.dim), bias = random<S>(s.vocab);
  const auto grad_losses = random<T>(s.rows);
  std::vector<int64_t> target(s.rows, -1), live;
  for (int64_t row = 0; row < s.rows; ++row)
    if (row % 3 || options & kEveryRow) target[row] = generator() % s.vocab, live.push_back(row);
  std::vector<T> losses(s.rows), statistics(2 * s.rows);
  std::vector<S> grad_hidden(hidden.size()), grad_weight(weight.size()), grad_bias(bias.size());
  CrossEntropyParams<S> p{s.rows, s.vocab, s.dim, hidden.data(), weight.data()};
  p.bias = options & kWithBias ? bias.data() : nullptr, p.target = target.data();
  p.live = live.data(), p.live_rows = static_cast<int64_t>(live.size());
  p.smoothing = options & kSmoothing ? T(0.1) : T(0), p.row_weight = T(0.5);
  p.losses = losses.data(), p.statistics = statistics.data();
  const auto want_gradients = [&] {
    p.grad_hidden = grad_hidden.data();
    if (!(options & kAllGradients)) return;
    p.grad_weight = grad_weight.data(), p.grad_bias = grad_bias.data();
  };
  if (!(options & kBackward)) want_gradients();
  cpu::cross_entropy(p, pool.threads, pool.run);
  if (options & kBackward) {
    want_gradients();
    p.losses = nullptr, p.row_weights = grad_losses.data();
    cpu::cross_entropy(p, pool.threads, pool.run);
  }
  Bytes results;
  for (const auto& values : {losses, statistics}) add(results, values);
  for (const auto& values : {grad_hidden, grad_weight, grad_bias}) add(results, values);
  return results;
}

template <class T>
Bytes argmax(const OutputSizes& s, const Pool& pool) {
  generator.seed(static_cast<unsigned>(s.vocab));
  const auto hidden = random<T>(s.rows * s.dim), weight = random<T>(s.vocab * s.dim), bias = random<T>(s.vocab);
  const auto search = cpu::Argmax<T>::make({s.vocab, s.dim, weight.data(), bias.data()}, pool.threads, pool.run);
  std::vector<int64_t> found;
  for (int64_t row = 0; row < s.rows; ++row)
    found.push_back(search->run(hidden.data() + row * s.dim, pool.threads, pool.run));
  Bytes results;
  add(results, found);
  return results;
}

template <class S>
Bytes gelu(int64_t n, const Pool& pool) {
  generator.seed(static_cast<unsigned>(n));
  const auto x = random<S>(n), grad_output = random<S>(n);
  std::vector<S> output(n), grad(n);
  cpu::gelu(GeluParams<S>{n, x.data(), nullptr, output.data()}, pool.threads, pool.run);
  cpu::gelu(GeluParams<S>{n, x.data(), grad_output.data(), grad.data()}, pool.threads, pool.run);
  Bytes results;
  add(results, output), add(results, grad);
  return results;
}

template <class S>
Bytes dropout(int64_t n, const Pool& pool) {
  generator.seed(static_cast<unsigned>(n));
  const auto x = random<S>(n);
  std::vector<S> output(n);
  cpu::dropout(DropoutParams<S>{n, x.data(), output.data(), 0.25, 7}, pool.threads, pool.run);
  Bytes results;
  add(results, output);
  return results;
}

template <class Run>
void same_on_every_pool(const std::string& what, const Run& run) {
  const auto expected = run(kPools[0]);
  for (const auto& pool : kPools)
    if (run(pool) != expected) throw std::runtime_error(what + ", " + pool.name + ": not the bits of one thread");
}

template <class S>
void run_recurrent() {
  // One row and few, many rows, odd sizes, units shared in groups, time and weight gradients in several chunks; last,
  // floats that are split wherever they meet weights, and where they meet those of the input.
  const Shape shapes[] = {{1, 1, 3, 17},  {1, 6, 40, 24},    {1, 30, 33, 100}, {1, 60, 5, 64},  {9, 1, 70, 256},
                          {5, 0, 3, 4},   {7, 2, 1, 1},      {6, 13, 9, 31},   {20, 40, 9, 64}, {4, 24, 16, 272},
                          {90, 7, 5, 33}, {10, 37, 70, 100}, {30, 9, 130, 200}};
  int form = 0;  // in turn: over all shapes each meets every option
  for (const auto& s : shapes)
    for (int i = 0; i < 8; ++i, ++form)
      same_on_every_pool("T " + std::to_string(s.seq_len) + " H " + std::to_string(s.hidden), [&](const Pool& pool) {
        return recurrent<S>(i & 1, s, static_cast<Form>(form % 3), i & 2, i & 4, pool);
      });
  const int64_t streams[][3] = {{1, 3, 17}, {2, 40, 128}, {9, 5, 33}};
  for (const auto& [batch, input_size, hidden] : streams)
    for (int i = 0; i < 4; ++i)
      same_on_every_pool("stream", [&, b = batch, n = input_size, h = hidden](const Pool& pool) {
        return stream<S>(i & 1, b, n, h, i & 2, pool);
      });
}

template <class S>
void run_attention() {
  // Single queries, few and many; keys in several chunks and parts; odd widths and none; shared keys.
  const AttentionSizes sizes[] = {{1, 2, 2, 1, 5, 8, 8},      {2, 4, 1, 2, 700, 17, 3},  {1, 3, 3, 40, 33, 64, 64},
                                  {2, 2, 1, 70, 300, 33, 16}, {1, 1, 1, 30, 1100, 8, 9}, {3, 2, 2, 13, 1, 1, 80},
                                  {2, 2, 1, 8, 20, 0, 5},     {2, 2, 1, 3, 20, 5, 0},    {1, 2, 1, 270, 290, 33, 24}};
  for (const auto& s : sizes)
    for (int options = 0; options < kAttentionOptions; ++options)
      same_on_every_pool("attention Tq " + std::to_string(s.q_len) + " options " + std::to_string(options),
                         [&](const Pool& pool) { return attention<S>(s, options, pool); });
}

// What language models have besides: rows in several blocks or items, words in several blocks of several parts, one
// word.
constexpr OutputSizes kOutputs[] = {{1, 1, 1}, {5, 33, 17},   {300, 70, 9},  {900, 40, 9},   {40, 3500, 33},
                                    {0, 4, 3}, {7, 130, 300}, {300, 600, 9}, {300, 100, 64}, {200, 700, 100}};

template <class S>
void run_models() {
  for (const auto& s : kOutputs)
    for (int options = 0; options < kOutputOptions; ++options)
      same_on_every_pool("output layer of " + std::to_string(s.vocab) + " options " + std::to_string(options),
                         [&](const Pool& pool) { return output_layer<S>(s, options, pool); });
  for (const int64_t n : {1, 63, 1000, 70001}) {
    same_on_every_pool("gelu", [&](const Pool& pool) { return gelu<S>(n, pool); });
    same_on_every_pool("dropout", [&](const Pool& pool) { return dropout<S>(n, pool); });
  }
}

template <class T>
void run_plain() {
  for (const auto& s : kOutputs)
    same_on_every_pool("argmax of " + std::to_string(s.vocab), [&](const Pool& pool) { return argmax<T>(s, pool); });
  if (sizeof(T) == 4)
    same_on_every_pool("T 200", [](const Pool& pool) {
      return recurrent<T>(true, {200, 8, 2, 410}, Form::kWhole, false, true, pool);
    });
  const int64_t products[][3] = {{1, 700, 300},  {9, 50, 17},   {33, 65, 700}, {5, 3, 2000},
                                 {256, 100, 1},  {130, 96, 70}, {900, 16, 64}, {64, 48, 2300},
                                 {400, 70, 100}, {0, 3, 4},     {3, 4, 0}};
  for (const auto& [m, n, k] : products)
    for (int i = 0; i < 4; ++i)
      same_on_every_pool(
          "gemm", [&, m = m, n = n, k = k](const Pool& pool) { return product<T>(m, n, k, i & 1, i & 2, pool); });
}

template <class T>
void run_all(const std::set<std::string>& families) {
  const auto wanted = [&](const char* family) { return families.empty() || families.count(family); };
  if (wanted("attention")) run_attention<T>();
  if (wanted("recurrent")) run_recurrent<T>();
  if (wanted("models")) run_models<T>();
  if constexpr (!std::is_same_v<T, BFloat16>)
    if (wanted("models")) run_plain<T>();
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

// On every instruction set that this machine can run, but for what it has in common with another (floats beside pairs
// of bfloat16, doubles beside tiles); with the argument "fastest", all of that one. "attention", "recurrent" or
// "models": only these kernels.
int main(int argc, char** argv) {
  std::set<std::string> families(argv + 1, argv + argc);
  const bool fastest = families.erase("fastest");
  for (const auto& isa : fastest ? std::vector{cpu::isa()} : cpu::usable_isas()) {
    cpu::set_isa(isa);
    const bool pairs = ends_with(isa, "_bf16"), tiles = ends_with(isa, "_amx");
    if (fastest || !pairs) run_all<float>(families);
    if (fastest || !(pairs || tiles)) run_all<double>(families);
    run_all<BFloat16>(families);
    std::printf("%s: every kernel asked for ran\n", isa.c_str());
    std::fflush(stdout);
  }
}
