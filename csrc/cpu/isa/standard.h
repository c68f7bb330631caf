// Every standard header that a kernel includes, before a target pragma is on: an inline function of theirs compiled
// for a newer ISA could be the copy that the linker keeps for all. Nothing else is included by an ISA's files before
// it.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/cost.h"
#include "cpu/isa.h"
#include "cpu/workspace.h"
