// What the scheduler needs of fibres.cpp.
#pragma once
#include "runtime.h"

namespace hostcuda {
void reserve_fibres(int count, void (*kernel)(void*), void* arguments);  // sets `threads`
void restart_fibres();   // after a launch that failed in the middle of a kernel
void resume(Thread& t);  // until it yields
void yield();            // of the current one, to the scheduler
}  // namespace hostcuda
