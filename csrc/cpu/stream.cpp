#include "cpu/stream.h"

#include "cpu/isa.h"

namespace fastlm::cpu {

template <class S>
Stream<S>::~Stream() = default;

template <class S>
std::unique_ptr<Stream<S>> Stream<S>::make(bool lstm, const StreamParams<S>& params) {
  const auto& table = kernels<S>();
  return std::unique_ptr<Stream>((lstm ? table.lstm : table.gru)->stream(params));
}

template class Stream<float>;
template class Stream<double>;
template class Stream<BFloat16>;

}  // namespace fastlm::cpu
