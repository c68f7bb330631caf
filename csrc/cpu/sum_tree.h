// Sums that members of a team make of parts of one result, added up in pairs: a tree that the number of parts alone
// decides, so that the bits are the same whoever is done first.
#pragma once

#include <cstdint>
#include <mutex>

namespace fastlm::cpu {

// Parts are the leaves, numbered as in a heap: the children of node n are 2 n and 2 n + 1. A sum lies in a slab, of
// which there are as many as parts; those free again are taken first, so that few are ever touched.
class SumTree {
 public:
  static constexpr int kPartsAtMost = 16;  // many cost memory, few leave threads idle at the end

  explicit SumTree(int parts) : parts_(parts), free_count_(parts) {
    for (int i = 0; i < parts; ++i) free_[i] = parts - 1 - i, waiting_[i] = kNone;
  }

  // The slab for the sum of a part.
  int take() {
    const std::lock_guard lock(mutex_);
    return free_[--free_count_];
  }

  // The sum of a part is complete. add(to, from) adds one slab to another.
  template <class Add>
  void give(int part, int slab, const Add& add) {
    for (int node = (parts_ + part) / 2; node > 0; node /= 2) {
      const int sibling = meet(node, slab);
      if (sibling == kNone) return;
      add(slab, sibling);
      free(sibling);
    }
    total_ = slab;
    free(slab);  // to be taken when all have read it
  }

  // Where the sum of all parts lies, when all are given and until one is taken again.
  int total() const { return total_; }

 private:
  static constexpr int kNone = -1;

  // The other child's slab, or none: then this one waits for it.
  int meet(int node, int slab) {
    const std::lock_guard lock(mutex_);
    const int sibling = waiting_[node];
    waiting_[node] = sibling == kNone ? slab : kNone;
    return sibling;
  }
  void free(int slab) {
    const std::lock_guard lock(mutex_);
    free_[free_count_++] = slab;
  }

  const int parts_;
  std::mutex mutex_;
  int free_count_, total_ = kNone;
  int free_[kPartsAtMost], waiting_[kPartsAtMost];  // of the inner nodes 1 to parts - 1
};

}  // namespace fastlm::cpu
