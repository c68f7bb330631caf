// Objects of the module that keep packed weights take their tensors as raw addresses, since a step is shorter than a
// call of a tensor operation; Python checks and keeps what they point to. All that needs pybind11 is compiled in one
// file (module.cpp), most of whose time is pybind11's.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/common.h"

namespace py = pybind11;

namespace fastlm::bindings {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastlm::bindings
