// fastlm._C.Argmax: cpu/argmax.h for Python, on raw addresses. fastlm/models/rnn/generation.py keeps what they point
// to.
#include "cpu/argmax.h"

#include <pybind11/pybind11.h>

#include "bindings/common.h"
#include "bindings/objects.h"

namespace py = pybind11;

namespace fastlm::bindings {
namespace {

using Address = std::uintptr_t;

template <class T>
void define(py::module_& module, const char* name) {
  using Class = cpu::Argmax<T>;
  const auto at = [](Address address) { return reinterpret_cast<const T*>(address); };
  py::class_<Class>(module, name, "The greatest logit of an output layer whose weights stay as they are.")
      .def(py::init([at](int64_t vocab, int64_t dim, Address weight, Address bias) {
             return Class::make({vocab, dim, at(weight), at(bias)}, max_threads(), parallel_for);
           }),
           "Addresses of weight (V, D) and bias (V), 0 for none.")
      .def(
          "run", [at](Class& self, Address hidden) { return self.run(at(hidden), max_threads(), parallel_for); },
          py::call_guard<py::gil_scoped_release>(), "The word with the greatest logit for hidden (D).");
}

}  // namespace

void define_argmax(py::module_& module) {
  define<float>(module, "ArgmaxFloat32");
  define<double>(module, "ArgmaxFloat64");
}

}  // namespace fastlm::bindings
