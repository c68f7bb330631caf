// fastlm._C.Stream: cpu/stream.h for Python; fastlm/nn/stream.py is its caller.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "bindings/objects.h"
#include "cpu/stream.h"

namespace fastlm::bindings {

// A stream of any element type.
class AnyStream {
 public:
  virtual ~AnyStream() = default;
  virtual std::unique_ptr<AnyStream> clone() const = 0;
  virtual void run(Address x, Address output, int64_t steps) = 0;
  virtual void read_state(Address h, Address c) const = 0;
  virtual void write_state(Address h, Address c) = 0;
  virtual void reset(int64_t row) = 0;
};

template <class S>
class TypedStream final : public AnyStream {
 public:
  explicit TypedStream(std::unique_ptr<cpu::Stream<S>> stream) : stream_(std::move(stream)) {}
  std::unique_ptr<AnyStream> clone() const override {
    return std::make_unique<TypedStream>(std::unique_ptr<cpu::Stream<S>>(stream_->clone()));
  }
  void run(Address x, Address output, int64_t steps) override {
    stream_->run(at<S>(x), at<S>(output), steps, max_threads(), parallel_for);
  }
  void read_state(Address h, Address c) const override { stream_->read_state(at<S>(h), at<Compute<S>>(c)); }
  void write_state(Address h, Address c) override { stream_->write_state(at<S>(h), at<Compute<S>>(c)); }
  void reset(int64_t row) override { stream_->reset(row); }

 private:
  std::unique_ptr<cpu::Stream<S>> stream_;
};

template <class S>
std::unique_ptr<AnyStream> make_stream(bool lstm, bool bfloat16_weights, int64_t batch, int64_t input_size,
                                       int64_t hidden, const std::vector<std::array<Address, 4>>& addresses) {
  std::vector<cpu::StreamWeights<S>> weights;
  for (const auto& [w_ih, w_hh, b_ih, b_hh] : addresses)
    weights.push_back({at<S>(w_ih), at<S>(w_hh), at<S>(b_ih), at<S>(b_hh)});
  const cpu::StreamParams<S> params{
      batch, input_size, hidden, static_cast<int64_t>(weights.size()), bfloat16_weights, weights.data()};
  return std::make_unique<TypedStream<S>>(cpu::Stream<S>::make(lstm, params));
}

inline void define_stream(py::module_& module) {
  py::class_<AnyStream>(module, "Stream", "A stack of recurrent layers with its state and packed weights.")
      .def("clone", &AnyStream::clone)
      .def("run", &AnyStream::run, py::call_guard<py::gil_scoped_release>())
      .def("read_state", &AnyStream::read_state)
      .def("write_state", &AnyStream::write_state)
      .def("reset", &AnyStream::reset);
  module.def(
      "make_stream",
      [](const std::string& dtype, bool lstm, bool bfloat16_weights, int64_t batch, int64_t input_size, int64_t hidden,
         const std::vector<std::array<Address, 4>>& weights) {
        const auto make_as = dtype == "float32"    ? make_stream<float>
                             : dtype == "float64"  ? make_stream<double>
                             : dtype == "bfloat16" ? make_stream<BFloat16>
                                                   : nullptr;
        if (!make_as) fail("make_stream: expected float32, float64 or bfloat16, got " + dtype);
        return make_as(lstm, bfloat16_weights, batch, input_size, hidden, weights);
      },
      "Weights: addresses of w_ih, w_hh, b_ih, b_hh of every layer, 0 for none.");
}

}  // namespace fastlm::bindings
