// Memory cut into cache-aligned pieces, contents void: scratch of one call, or what an object keeps. Pieces are taken
// twice: once to count, once to get pointers, so that sizes are written in one place.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // A piece of n elements; null while counting.
  template <class T>
  T* take(int64_t n) {
    const int64_t offset = used_, bytes = n * static_cast<int64_t>(sizeof(T));
    // One line more than asked for staggers pieces whose size is a power of two over the cache's sets.
    used_ += (bytes + 63) / 64 * 64 + 64;
    if (base_) guard(offset + bytes, used_);
    return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
  }

  // Ends counting: allocates and starts over. Throws std::bad_alloc.
  void allocate();
  // The same from the heap alone, for an object that lives on: the block kept for calls is no place for it.
  void allocate_lasting();

 private:
  void allocate_fresh(int64_t needed);
  // Forbids a range between two pieces, where AddressSanitizer watches.
  void guard(int64_t begin, int64_t end) const;

  char* base_ = nullptr;
  bool lasting_ = false;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace fastlm::cpu
