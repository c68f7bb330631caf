// fastlm._C.Argmax: cpu/argmax.h for Python; fastlm/models/_generation.py is its caller.
#pragma once

#include "bindings/objects.h"
#include "cpu/argmax.h"

namespace fastlm::bindings {

template <class T>
void define_argmax(py::module_& module, const char* name) {
  using Class = cpu::Argmax<T>;
  py::class_<Class>(module, name, "The greatest logit of an output layer whose weights stay as they are.")
      .def(py::init([](int64_t vocab, int64_t dim, Address weight, Address bias) {
             return Class::make({vocab, dim, at<const T>(weight), at<const T>(bias)}, max_threads(), parallel_for);
           }),
           "Addresses of weight (V, D) and bias (V), 0 for none.")
      .def(
          "run", [](Class& self, Address hidden) { return self.run(at<const T>(hidden), max_threads(), parallel_for); },
          py::call_guard<py::gil_scoped_release>(), "The word with the greatest logit for hidden (D).");
}

}  // namespace fastlm::bindings
