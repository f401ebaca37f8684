// Fibres: their stacks, and the switch from one to another.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "fibres.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(HOSTCUDA_PORTABLE)
#define HOSTCUDA_PORTABLE
#endif
#ifdef HOSTCUDA_PORTABLE
#include <ucontext.h>
#endif

namespace hostcuda {

static constexpr size_t STACK = 256 << 10;  // address space: only pages that were used cost memory
static constexpr int MAX_THREADS = 1024;
static std::vector<Thread> fibres;
static void (*body)(void*);
static void* closure;

static void enter();

#ifndef HOSTCUDA_PORTABLE
// setjmp would do, but AddressSanitizer makes longjmp 16 times slower; swapcontext costs a system
// call. The registers a call must preserve go on the old stack and come from the new one.
extern "C" void hostcuda_switch(void** save, void* to);
asm(R"(
    .text
    .globl hostcuda_switch
    .type hostcuda_switch, @function
hostcuda_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
static void* scheduler_pointer;

static void prepare(Thread& t) {
    void** top = (void**)(t.stack + STACK);
    *--top = nullptr;  // enter() never returns; this keeps its stack aligned as after a call
    *--top = (void*)enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t.stack_pointer = top;
}
static void to_thread(Thread& t) { hostcuda_switch(&scheduler_pointer, t.stack_pointer); }
static void to_scheduler(Thread& t) { hostcuda_switch(&t.stack_pointer, scheduler_pointer); }
#else
static ucontext_t scheduler_context;

static void prepare(Thread& t) {
    auto* context = new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = t.stack;
    context->uc_stack.ss_size = STACK;
    makecontext(context, enter, 0);
    delete (ucontext_t*)t.stack_pointer;
    t.stack_pointer = context;
}
static void to_thread(Thread& t) { swapcontext(&scheduler_context, (ucontext_t*)t.stack_pointer); }
static void to_scheduler(Thread& t) {
    swapcontext((ucontext_t*)t.stack_pointer, &scheduler_context);
}
#endif

#ifdef __SANITIZE_ADDRESS__
static const void* scheduler_stack;
static size_t scheduler_size;
#endif

void resume(Thread& t) {
    current = &t;
    t.state = State::running;
#ifdef __SANITIZE_ADDRESS__
    void* own;
    __sanitizer_start_switch_fiber(&own, t.stack, STACK);
    to_thread(t);
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#else
    to_thread(t);
#endif
}

void yield() {
    Thread& t = *current;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&t.asan_stack, scheduler_stack, scheduler_size);
    to_scheduler(t);
    __sanitizer_finish_switch_fiber(t.asan_stack, &scheduler_stack, &scheduler_size);
#else
    to_scheduler(t);
#endif
}

static void enter() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    for (;;) {  // one turn a block
        body(closure);
        current->state = State::done;
        yield();
    }
}

// Each stack has a page below it that must not be touched: an overflow ends at once.
static char* new_stack() {
    size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, page + STACK, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) std::abort();
    return (char*)memory + page;
}

// A failed launch leaves fibres in the middle of a kernel: start them afresh.
void restart_fibres() {
    for (Thread& t : fibres) {
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(t.stack, STACK);
#endif
        prepare(t);
    }
}

void reserve_fibres(int count, void (*kernel)(void*), void* arguments) {
    body = kernel;
    closure = arguments;
    fibres.reserve(MAX_THREADS);  // once: a waiting fibre holds a reference to its own
    while ((int)fibres.size() < count) {
        Thread t{};
        t.stack = new_stack();
        prepare(t);
        fibres.push_back(t);
    }
    threads = fibres.data();
    thread_count = count;
}

}  // namespace hostcuda
