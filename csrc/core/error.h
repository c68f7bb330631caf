// How a call that cannot be run is refused: a ValueError in Python.
#pragma once

#include <stdexcept>
#include <string>

namespace fastlm {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace fastlm
