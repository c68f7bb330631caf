#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace fastlm::cpu {
namespace {

constexpr int64_t kMostIdle = 1 << 30;

struct Idle {
  std::mutex mutex;
  std::vector<Pages> blocks;  // the longest idle first
  int64_t bytes = 0;

  Pages remove(size_t i) {
    const Pages block = blocks[i];
    blocks.erase(blocks.begin() + i);
    bytes -= block.bytes;
    return block;
  }
};
Idle& idle() {
  static Idle* const instance = new Idle;  // never destroyed: tensors may outlive everything else
  return *instance;
}

// Of the idle blocks the smallest that holds so much, unless half of it would lie bare.
Pages take_idle(Idle& idle, int64_t bytes) {
  const auto& blocks = idle.blocks;
  size_t best = blocks.size();
  for (size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].bytes >= bytes && blocks[i].bytes <= 2 * bytes)
      if (best == blocks.size() || blocks[i].bytes < blocks[best].bytes) best = i;
  return best < blocks.size() ? idle.remove(best) : Pages{};
}

// Gives so much back to the system, of what has been idle for longest.
void release_idle(Idle& idle, int64_t bytes) {
  while (bytes > 0 && !idle.blocks.empty()) {
    const Pages block = idle.remove(0);
    bytes -= block.bytes;
    std::free(block.base);
  }
}

bool lend_to_system([[maybe_unused]] const Pages& pages) {
#if defined(__linux__) && defined(MADV_FREE)
  return madvise(pages.base, pages.bytes, MADV_FREE) == 0;
#else
  return false;
#endif
}

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const auto first = reinterpret_cast<uintptr_t>(begin), aligned = first / page * page;
  madvise(reinterpret_cast<void*>(aligned), bytes + (first - aligned), MADV_HUGEPAGE);
#endif
}

Pages take_pages(int64_t bytes) {
  const int64_t needed = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  // try_lock, here and below: a process forked while the lock was held would wait for ever.
  if (std::unique_lock lock(idle().mutex, std::try_to_lock); lock) {
    if (const Pages found = take_idle(idle(), needed); found.base) return found;
    release_idle(idle(), needed);  // blocks that nothing fits any more make room for one that does
  }
  char* base = static_cast<char*>(std::aligned_alloc(kHugePage, needed));
  if (base)
    ask_for_huge_pages(base, needed);
  else if (std::unique_lock lock(idle().mutex, std::try_to_lock); lock)
    release_idle(idle(), idle().bytes);
  return {base, needed};
}

void give_pages(const Pages& pages) {
  if (pages.bytes <= kMostIdle && lend_to_system(pages))
    if (std::unique_lock lock(idle().mutex, std::try_to_lock); lock) {
      release_idle(idle(), idle().bytes + pages.bytes - kMostIdle);
      idle().blocks.push_back(pages);
      idle().bytes += pages.bytes;
      return;
    }
  std::free(pages.base);
}

}  // namespace fastlm::cpu
