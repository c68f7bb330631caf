#include "cpu/team.h"

#include <chrono>
#include <thread>

namespace fastlm::cpu {
namespace {

constexpr uint64_t kClosed = uint64_t{1} << 32;
// A spin of some ten microseconds covers the usual skew of two members; beyond it another process has the core.
constexpr int kSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

int TeamState::join(int chunk, int covered, int64_t patience_ns) {
  uint64_t seen = door_.load(std::memory_order_acquire);
  int rank;
  do {
    if (seen & kClosed) return -1;
    rank = static_cast<int>(seen & 0xffff);
  } while (
      !door_.compare_exchange_weak(seen, seen + 1 + (static_cast<uint64_t>(covered) << 16), std::memory_order_acq_rel));
  const int64_t deadline = now_ns() + patience_ns;
  for (int spins = 0; size() == 0; ++spins) {
    seen = door_.load(std::memory_order_acquire);
    const bool complete = static_cast<int>((seen >> 16) & 0xffff) == wanted_;
    if (!(seen & kClosed) && (complete || (spins % 64 == 63 && now_ns() > deadline))) close(seen);
    pause();
  }
  return size() == wanted_ ? chunk : rank;
}

bool TeamState::close(uint64_t seen) {
  if (!door_.compare_exchange_strong(seen, seen | kClosed, std::memory_order_acq_rel)) return false;
  size_.store(static_cast<int>(seen & 0xffff), std::memory_order_release);
  return true;
}

int64_t TeamState::take(int owner, uint16_t round, int64_t begin, int64_t end, bool last) {
  std::atomic<uint64_t>& left = shares_[owner].left;
  uint64_t seen = left.load(std::memory_order_relaxed);
  for (;;) {
    const auto ahead = static_cast<int16_t>(static_cast<uint16_t>(seen >> 48) - round);
    if (ahead > 0) return -1;  // the owner is rounds further
    if (ahead == 0) begin = seen >> 24 & 0xffffff, end = seen & 0xffffff;
    if (begin >= end) {
      // A round without items is noted too: one that nobody ever noted would in time look like one to come.
      if (ahead < 0 && !left.compare_exchange_weak(seen, uint64_t{round} << 48, std::memory_order_relaxed)) continue;
      return -1;
    }
    const int64_t from = last ? begin : begin + 1, to = last ? end - 1 : end;
    if (left.compare_exchange_weak(seen, uint64_t{round} << 48 | from << 24 | to, std::memory_order_relaxed))
      return last ? to : begin;
  }
}

void TeamState::barrier() {
  const int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace fastlm::cpu
