// Every memory access of a kernel, judged and counted in the builds that can see them.
#pragma once
#include <cstddef>

namespace bnk {

// Ends the launch unless the running thread may do this. `instruction` is the address it does it from.
void access(const void* address, size_t bytes, size_t alignment, bool is_write, void* instruction);

}  // namespace bnk
