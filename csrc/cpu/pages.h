// Memory of large results, in huge pages where the system grants them. Blocks given back are kept for later results:
// fresh pages have to be cleared, which takes longer than most kernels take to fill them.
#pragma once

#include <cstdint>

namespace fastlm::cpu {

// From this many bytes on, memory is asked for in huge pages.
constexpr int64_t kHugePage = 2 << 20;
// A wish only, which not every system heeds.
void ask_for_huge_pages(void* begin, int64_t bytes);

struct Pages {
  char* base;
  int64_t bytes;
};
// At least so many bytes, contents void; at null where there is not so much memory, the idle blocks then given back.
Pages take_pages(int64_t bytes);
// While they wait for their next use, the system may take them for whoever needs memory (MADV_FREE).
void give_pages(const Pages& pages);

}  // namespace fastlm::cpu
