// A team: the threads that run one kernel call together, with a barrier.
//
// The core starts no threads. The binding hands in a parallel_for (torch's pool); each chunk that it delivers joins the
// team. Whoever waits too long for the others closes the door and goes on with those present (down to alone), so a
// busy machine, OMP_THREAD_LIMIT, a nested call or a pool that runs chunks one after another costs time but never
// hangs. Kernels give the same bits for every team size, which is what makes this legal.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace fastlm::cpu {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, ParallelBody body, void* context);

class TeamState {
 public:
  explicit TeamState(int wanted)
      : wanted_(wanted), more_(wanted > kFew ? new Share[wanted] : nullptr), shares_(more_ ? more_.get() : few_) {}

  // Joins with a chunk, the first of `covered` of the wanted members; returns the rank, or -1 when the door is closed.
  // Where all have come, the rank is the chunk: what a pool's thread worked on in other calls is in its cache.
  int join(int chunk, int covered, int64_t patience_ns);
  int size() const { return size_.load(std::memory_order_acquire); }
  void barrier();

  // Takes one of the items [begin, end) that `owner` has in a round, from either end; -1 when none is left.
  int64_t take(int owner, uint16_t round, int64_t begin, int64_t end, bool last);

 private:
  // What is left of a member's items: round << 48 | begin << 24 | end. Whoever comes first fills it in.
  struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
  };
  bool close(uint64_t seen);

  static constexpr int kFew = 8;  // members of a team that allocates nothing

  const int wanted_;
  const std::unique_ptr<Share[]> more_;
  Share few_[kFew];
  Share* const shares_;
  alignas(64) std::atomic<uint64_t> door_{0};  // members | covered << 16 | closed << 32
  std::atomic<int> size_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

class Team {
 public:
  Team(TeamState* state, int rank, int size) : rank(rank), size(size), state_(state) {}
  const int rank, size;

  void barrier() const {
    if (size > 1) state_->barrier();
  }

  // This member's part [begin, end) of n items, in units of `unit` items.
  struct Range {
    int64_t begin, end;
  };
  Range split(int64_t n, int64_t unit = 1) const { return part(rank, n, unit); }

  // Runs body(item) for n items (below 2^24) between all members, each once: a member begins with its own part, the
  // same every time so that what they read stays in its cache, and then helps those behind, for cores differ in speed
  // from moment to moment. Every member calls it; no barrier at the end. `backwards`: own items from the last on; every
  // second time, so that an item finds in the cache what the last round left there.
  template <class Body>
  void share(int64_t n, bool backwards, const Body& body) const {
    ++round_;
    for (int turn = 0; turn < size; ++turn) {
      const int owner = (rank + turn) % size;
      Range items = part(owner, n, 1);
      const bool last = backwards == (turn == 0);
      const auto next = [&] {
        if (size > 1) return state_->take(owner, round_, items.begin, items.end, last);
        return items.begin == items.end ? -1 : last ? --items.end : items.begin++;
      };
      for (int64_t item; (item = next()) >= 0;) body(item);
    }
  }

 private:
  Range part(int member, int64_t n, int64_t unit) const {
    const int64_t units = (n + unit - 1) / unit;
    const int64_t begin = units * member / size * unit, end = units * (member + 1) / size * unit;
    return {begin < n ? begin : n, end < n ? end : n};
  }

  TeamState* state_;
  mutable uint16_t round_ = 0;  // of share(), the same in all members
};

// Runs body(team) on up to `wanted` threads. `work_ns` (an estimate) sets how long a member waits for the others.
template <class Body>
void run_team(ParallelFor parallel_for, int wanted, int64_t work_ns, const Body& body) {
  TeamState state(wanted);
  if (wanted <= 1) return body(Team(&state, 0, 1));
  struct Context {
    TeamState& state;
    const Body& body;
    int64_t patience_ns;
  } context{state, body, 50000 + work_ns / 4};
  parallel_for(
      0, wanted,
      [](int64_t begin, int64_t end, void* raw) {
        auto& context = *static_cast<Context*>(raw);
        const int rank =
            context.state.join(static_cast<int>(begin), static_cast<int>(end - begin), context.patience_ns);
        if (rank >= 0) context.body(Team(&context.state, rank, context.state.size()));
      },
      &context);
}

}  // namespace fastlm::cpu
