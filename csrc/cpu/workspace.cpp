#include "cpu/workspace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "cpu/pages.h"

namespace fastlm::cpu {
namespace {

constexpr int64_t kMostKept = 64 << 20;

// The last block given back, for the next call: fresh memory costs a page fault every 4 KiB, more than a short call's
// arithmetic. One block of the process at most; a call that finds none (the first, or one beside another) allocates.
struct Kept {
  std::mutex mutex;
  char* base = nullptr;
  int64_t size = 0;
};
Kept& kept() {
  static Kept* const instance = new Kept;  // never destroyed: a call may come while the process ends
  return *instance;
}

}  // namespace

void Workspace::allocate() {
  const int64_t needed = std::exchange(used_, 0);
  // try_lock, here and below: to wait for another call would cost more than an allocation.
  if (std::unique_lock lock(kept().mutex, std::try_to_lock); lock && kept().size >= needed) {
    base_ = std::exchange(kept().base, nullptr);
    size_ = std::exchange(kept().size, 0);
  }
  if (!base_) allocate_fresh(needed);
}

void Workspace::allocate_lasting() {
  lasting_ = true;
  allocate_fresh(std::exchange(used_, 0));
}

void Workspace::allocate_fresh(int64_t needed) {
  const int64_t unit = needed < kHugePage ? 64 : kHugePage;
  size_ = (needed + unit) / unit * unit;
  base_ = static_cast<char*>(std::aligned_alloc(unit, size_));
  if (!base_) throw std::bad_alloc();
  if (unit == kHugePage) ask_for_huge_pages(base_, size_);  // columns are read, a page apart each
}

void Workspace::guard([[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) const {
  ASAN_POISON_MEMORY_REGION(base_ + begin, end - begin);
}

Workspace::~Workspace() {
  if (base_) ASAN_UNPOISON_MEMORY_REGION(base_, size_);
  if (base_ && !lasting_ && size_ <= kMostKept)
    if (std::unique_lock lock(kept().mutex, std::try_to_lock); lock && kept().size < size_) {
      std::swap(base_, kept().base);
      kept().size = size_;
    }
  std::free(base_);
}

}  // namespace fastlm::cpu
