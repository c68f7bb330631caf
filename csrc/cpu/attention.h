// Attention entries for bindings, and how one call is cut into items that threads share.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"
#include "cpu/team.h"

namespace fastlm::cpu {

// Where the rows of one sequence begin and how many there are; `offset`: of a query's position to its index.
struct AttentionSequence {
  int64_t q_begin, q_len, k_begin, k_len, offset;
};
template <class S>
AttentionSequence attention_sequence(const AttentionParams<S>& p, int64_t b);

// All query heads of one key/value head, over a range of queries (forward) or of keys (decoding, backward).
struct AttentionItem {
  int64_t b, kv_head, begin, end;
  int64_t part;  // of the parts that the keys of this head are cut into
};

// Depends on sizes alone, `threads` excepted: results are the same for every number of them.
struct AttentionPlan {
  std::vector<AttentionItem> items;
  int64_t most_rows;            // of one item: query heads times queries (forward), keys (backward)
  int64_t parts;                // at most, of the keys of one head
  bool all_batches, all_heads;  // an item of backward is of every sequence, of every head
  bool decode;                  // so few queries that keys and values are read in place, once
  int threads;                  // wanted members
  int64_t work_ns;              // rough time on one thread

  template <class S>
  static AttentionPlan make(const AttentionForwardParams<S>& p, int max_threads);
  template <class S>
  static AttentionPlan make(const AttentionBackwardParams<S>& p, int max_threads);
};

template <class S>
void attention_forward(const AttentionForwardParams<S>& p, int max_threads, ParallelFor parallel_for);
template <class S>
void attention_backward(const AttentionBackwardParams<S>& p, int max_threads, ParallelFor parallel_for);

}  // namespace fastlm::cpu
