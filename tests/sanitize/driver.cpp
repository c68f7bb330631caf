// Runs every kernel of csrc/cpu without torch, for `make sanitize`: on threads that the sanitizers see from their first
// instruction (torch's pool is not built with them), every tensor in a heap block of its own size, so that a read past
// an end is one past the block's. Each call must give the bits of one thread, whatever the pool does.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/gates.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/recurrent.h"

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

template <class T>
std::vector<T> random(int64_t n) {
  std::uniform_real_distribution<T> value(-0.1, 0.1);  // so small that 200 steps stay finite
  std::vector<T> made(n);
  for (auto& v : made) v = value(generator);
  return made;
}

template <class T>
using Results = std::vector<std::vector<T>>;

struct Shape {
  int64_t seq_len, batch, input_size, hidden;
};

// Outputs of forward and every gradient of backward.
template <class T>
Results<T> recurrent(bool lstm, const Shape& s, bool reverse, bool optional, const Pool& pool) {
  generator.seed(static_cast<unsigned>(s.seq_len * 1000 + s.hidden));
  const int64_t gates = (lstm ? int{kLstmGates} : int{kGruGates}) * s.hidden, state = s.batch * s.hidden;
  const int64_t steps = s.seq_len * s.batch, kept = lstm ? int{kLstmReserve} : int{kGruReserve};
  const auto x = random<T>(steps * s.input_size), h0 = random<T>(state), c0 = random<T>(state);
  const auto w_ih = random<T>(gates * s.input_size), w_hh = random<T>(gates * s.hidden);
  const auto b_ih = random<T>(gates), b_hh = random<T>(gates);
  const auto grad_output = random<T>(steps * s.hidden), grad_h_n = random<T>(state), grad_c_n = random<T>(state);
  const auto given = [&](const std::vector<T>& values) { return optional ? values.data() : nullptr; };

  std::vector<T> output(steps * s.hidden), h_n(state), c_n(state), reserve(steps * kept * s.hidden);
  RecurrentForwardParams<T> f{};
  f.seq_len = s.seq_len, f.batch = s.batch, f.input_size = s.input_size, f.hidden = s.hidden;
  f.x = x.data(), f.h0 = given(h0), f.c0 = given(c0), f.w_ih = w_ih.data(), f.w_hh = w_hh.data();
  f.b_ih = given(b_ih), f.b_hh = given(b_hh), f.reverse = reverse;
  f.output = output.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.reserve = reserve.data();
  (lstm ? cpu::lstm_forward<T> : cpu::gru_forward<T>)(f, pool.threads, pool.run);

  std::vector<T> grad_x(steps * s.input_size), grad_h0(state), grad_c0(state);
  std::vector<T> grad_w_ih(w_ih.size()), grad_w_hh(w_hh.size()), grad_b_ih(gates), grad_b_hh(gates);
  RecurrentBackwardParams<T> b{};
  b.seq_len = s.seq_len, b.batch = s.batch, b.input_size = s.input_size, b.hidden = s.hidden;
  b.grad_output = grad_output.data(), b.grad_h_n = given(grad_h_n), b.grad_c_n = given(grad_c_n);
  b.x = x.data(), b.w_ih = w_ih.data(), b.w_hh = w_hh.data(), b.reserve = reserve.data(), b.reverse = reverse;
  b.grad_x = optional ? grad_x.data() : nullptr, b.grad_h0 = optional ? grad_h0.data() : nullptr;
  b.grad_c0 = optional && lstm ? grad_c0.data() : nullptr;
  b.grad_w_ih = grad_w_ih.data(), b.grad_w_hh = grad_w_hh.data(), b.grad_b_ih = grad_b_ih.data();
  b.grad_b_hh = lstm ? nullptr : grad_b_hh.data();
  (lstm ? cpu::lstm_backward<T> : cpu::gru_backward<T>)(b, pool.threads, pool.run);
  return {output, h_n, c_n, reserve, grad_x, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh};
}

template <class T>
Results<T> product(int64_t m, int64_t n, int64_t k, bool transpose_a, bool transpose_b, const Pool& pool) {
  generator.seed(static_cast<unsigned>(m + n + k));
  const auto a = random<T>(m * k), b = random<T>(k * n);
  std::vector<T> c(m * n);
  cpu::gemm(GemmParams<T>{m, n, k, a.data(), transpose_a ? m : k, transpose_a, b.data(), transpose_b ? k : n,
                          transpose_b, c.data(), n, false},
            pool.threads, pool.run);
  return {c};
}

template <class Run>
void same_on_every_pool(const std::string& what, const Run& run) {
  const auto expected = run(kPools[0]);
  for (const auto& pool : kPools)
    if (run(pool) != expected) throw std::runtime_error(what + ", " + pool.name + ": not the bits of one thread");
}

template <class T>
void check_recurrent(bool lstm, const Shape& s, bool reverse, bool optional) {
  same_on_every_pool((lstm ? "lstm T " : "gru T ") + std::to_string(s.seq_len) + " H " + std::to_string(s.hidden),
                     [&](const Pool& pool) { return recurrent<T>(lstm, s, reverse, optional, pool); });
}

template <class T>
void run_all() {
  // One row and few, many rows, odd sizes, units shared in groups, time and weight gradients in several chunks.
  const Shape shapes[] = {{1, 1, 3, 17},   {1, 6, 40, 24},   {1, 30, 33, 100}, {1, 60, 5, 64},
                          {9, 1, 70, 256}, {5, 0, 3, 4},     {7, 2, 1, 1},     {6, 13, 9, 31},
                          {20, 40, 9, 64}, {4, 24, 16, 272}, {90, 7, 5, 33}};
  for (const auto& s : shapes)
    for (int i = 0; i < 8; ++i) check_recurrent<T>(i & 1, s, i & 2, i & 4);
  if (sizeof(T) == 4) check_recurrent<T>(true, {200, 8, 2, 410}, false, true);
  const int64_t products[][3] = {{1, 700, 300}, {9, 50, 17},   {33, 65, 700},  {5, 3, 2000}, {256, 100, 1},
                                 {130, 96, 70}, {900, 16, 64}, {64, 48, 2300}, {0, 3, 4},    {3, 4, 0}};
  for (const auto& [m, n, k] : products)
    for (int i = 0; i < 4; ++i)
      same_on_every_pool(
          "gemm", [&, m = m, n = n, k = k](const Pool& pool) { return product<T>(m, n, k, i & 1, i & 2, pool); });
}

}  // namespace

// On every instruction set that this machine can run; with the argument "fastest", on that one.
int main(int argc, char** argv) {
  const bool fastest = argc > 1 && std::string(argv[1]) == "fastest";
  for (const auto& isa : fastest ? std::vector{cpu::isa()} : cpu::usable_isas()) {
    cpu::set_isa(isa);
    run_all<float>();
    run_all<double>();
    std::printf("%s: every kernel ran\n", isa.c_str());
  }
}
