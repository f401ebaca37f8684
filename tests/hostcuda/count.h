// The traffic count: what each warp reads and writes in global memory. See count.cpp.
#pragma once
#include "runtime.h"

namespace hostcuda {
#ifdef HOSTCUDA_COUNT
void count_start(const Launch&);
const char* count_block();  // null, or what is wrong with the calls
#else
inline void count_start(const Launch&) {}
inline const char* count_block() { return nullptr; }
#endif
}  // namespace hostcuda
