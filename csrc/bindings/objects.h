// What the module has besides introspection: objects that keep packed weights.
#pragma once

#include <pybind11/pybind11.h>

namespace fastlm::bindings {

void define_stream(pybind11::module_& module);  // Stream and make_stream
void define_argmax(pybind11::module_& module);  // ArgmaxFloat32 and ArgmaxFloat64

}  // namespace fastlm::bindings
