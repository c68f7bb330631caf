#pragma once

#include <pybind11/pybind11.h>

namespace fastlm::bindings {

// Adds Stream and make_stream to the module.
void define_stream(pybind11::module_& module);

}  // namespace fastlm::bindings
