#include "cpu/sequences.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "core/error.h"

namespace fastlm::cpu {
Sequences::Sequences(const std::vector<int64_t>& lengths) : before_(1, 0) {
  for (const int64_t length : lengths) before_.push_back(before_.back() + length);
  const int64_t steps = lengths.empty() ? 0 : lengths.front();
  first_.push_back(0);
  for (int64_t t = 0, active = static_cast<int64_t>(lengths.size()); t < steps; ++t) {
    while (lengths[active - 1] <= t) --active;
    first_.push_back(first_.back() + active);
  }
}

Sequences Sequences::padded(const int64_t* lengths, int64_t batch, int64_t seq_len) {
  for (int64_t b = 0; b < batch; ++b)
    if (lengths[b] < 0 || lengths[b] > seq_len)
      fail("lengths: expected 0 to " + std::to_string(seq_len) + " (T), got " + std::to_string(lengths[b]) +
           " at index " + std::to_string(b));
  std::vector<int64_t> order(batch), sorted(batch);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::transform(order.begin(), order.end(), sorted.begin(), [&](int64_t b) { return lengths[b]; });
  Sequences made(sorted);
  made.uniform_ = batch == 0 || sorted.back() == seq_len;
  for (size_t t = 0; t + 1 < made.first_.size(); ++t)
    for (int64_t i = 0; i < made.first_[t + 1] - made.first_[t]; ++i)
      made.place_.push_back(static_cast<int64_t>(t) * batch + order[i]);
  made.order_ = std::move(order);
  return made;
}

Sequences Sequences::packed(const int64_t* batch_sizes, int64_t steps, int64_t rows) {
  const auto got = [&](int64_t t) {
    return ", got " + std::to_string(batch_sizes[t]) + " at index " + std::to_string(t);
  };
  for (int64_t t = 0; t < steps; ++t) {
    if (batch_sizes[t] < 1) fail("batch_sizes: expected positive numbers" + got(t));
    if (t > 0 && batch_sizes[t] > batch_sizes[t - 1]) fail("batch_sizes: expected numbers that never grow" + got(t));
  }
  int64_t sum = 0;
  for (int64_t t = 0; t < steps; sum += batch_sizes[t++])
    if (batch_sizes[t] > rows - sum)  // asked before it is added: the sum of huge numbers could come round to `rows`
      fail("batch_sizes: expected a sum of " + std::to_string(rows) + " (the rows of x), got more from index " +
           std::to_string(t) + " on");
  if (sum != rows)
    fail("batch_sizes: expected a sum of " + std::to_string(rows) + " (the rows of x), got " + std::to_string(sum));
  std::vector<int64_t> lengths(steps > 0 ? batch_sizes[0] : 0);
  for (int64_t t = 0; t < steps; ++t) std::for_each_n(lengths.begin(), batch_sizes[t], [](int64_t& n) { ++n; });
  return Sequences(lengths);
}

Ragged Sequences::view() const {
  return {static_cast<int64_t>(first_.size()) - 1, first_.data(), before_.data(),
          place_.empty() ? nullptr : place_.data(), order_.empty() ? nullptr : order_.data()};
}

}  // namespace fastlm::cpu
