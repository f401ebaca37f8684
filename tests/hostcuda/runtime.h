// The scheduler of the host build: one fibre per CUDA thread, blocks one after another.
//
// A fibre runs until it meets a barrier or a warp operation, says so, and yields. The scheduler
// lets a group go on once everyone the operation names has come. Who can no longer come makes
// the launch fail with a message: on a GPU that is a hang, or silently wrong.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include <vector_types.h>

namespace hostcuda {

constexpr int WARP = 32;

enum class State { running, at_barrier, at_warp_operation, done };

struct Thread {
    void* stack_pointer;  // first member: the assembly of runtime.cpp stores through it
    char* stack;
    State state;
    uint3 index;
    int warp, lane;
    const char* operation;  // what it waits at, where
    const char* file;
    int line;
    unsigned mask;   // of a warp operation
    uint64_t offer;  // what it brings to the operation ...
    uint64_t value;  // ... and what the others read, and who they are: both are settled when the
    unsigned group;  // group is let go, because the first to go on may come to its next
                     // operation, or end, before the last has read
    void* asan_stack;
};

struct Launch {
    const char* kernel;
    dim3 grid, block;
    unsigned dynamic_shared;  // bytes
    unsigned seed;            // of the order of fibres and blocks, where that is shuffled
    const uint64_t* ranges;   // (address, bytes) of each argument, for the traffic count
    int arguments;
};

extern Thread* current;
extern Thread* threads;  // of this block
extern int thread_count;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern unsigned char* dynamic_shared;
extern uint64_t block_serial;  // counts blocks over all launches
extern int barrier_count;      // predicates that were true at the last barrier

void wait(State state, const char* operation, const char* file, int line);
void fail(const char* what);  // ends the launch with a message
const char* run(const Launch&, void (*body)(void*), void* closure);  // null, or what went wrong
void poison(void* shared, size_t bytes);
void count_access(const void* address, int bytes, bool store, bool active);

// Shared memory holds what another block left: NaN here, so that a read before the write shows.
template <class T>
bool poisoned(T& variable, uint64_t& serial) {
    if (serial != block_serial) {
        serial = block_serial;
        poison((void*)&variable, sizeof variable);
    }
    return true;
}

inline int barrier(bool predicate, const char* operation, const char* file, int line) {
    current->offer = predicate;
    wait(State::at_barrier, operation, file, line);
    return barrier_count;
}

inline void warp_operation(unsigned mask, uint64_t offer, const char* name, const char* file,
                           int line) {
    current->mask = mask;
    current->offer = offer;
    wait(State::at_warp_operation, name, file, line);
}

// The value of a lane; all bits set where the lane is gone or not in the mask (undefined in CUDA).
inline uint64_t value_of(int lane) {
    bool there = current->group >> lane & 1;
    return there ? threads[current->warp * WARP + lane].value : ~uint64_t(0);
}

template <class T>
T exchange(unsigned mask, T value, int source, const char* name, const char* file, int line) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no such shuffle in CUDA");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    warp_operation(mask, bits, name, file, line);
    bits = value_of(source);
    std::memcpy((void*)&value, &bits, sizeof value);
    return value;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* name, const char* file, int line) {
    warp_operation(mask, predicate, name, file, line);
    unsigned bits = 0;
    for (int lane = 0; lane < WARP; lane++)
        if (value_of(lane) == 1) bits |= 1u << lane;
    return bits;
}

// Letters for the Python side, which checks every argument against them.
template <class T>
constexpr char kind() {
    if (std::is_pointer_v<T>) return 'p';
    if (std::is_same_v<T, bool>) return 'b';
    if (std::is_floating_point_v<T>) return 'f';
    return std::is_integral_v<T> ? 'i' : 's';
}

template <class... Arguments>
const char* signature(void (*)(Arguments...)) {
    static const char letters[] = {kind<Arguments>()..., 0};
    return letters;
}

template <class... Arguments>
int sizes(void (*)(Arguments...), int* out) {
    int bytes[] = {(int)sizeof(Arguments)..., 0};
    std::memcpy(out, bytes, sizeof bytes - sizeof(int));
    return sizeof...(Arguments);
}

template <class... Arguments, size_t... I>
const char* call(void (*kernel)(Arguments...), const Launch& launch, void** arguments,
                 std::index_sequence<I...>) {
    auto body = [&] { kernel(*(std::remove_const_t<Arguments>*)arguments[I]...); };
    return run(launch, [](void* closure) { (*(decltype(body)*)closure)(); }, &body);
}

template <class... Arguments>
const char* call(void (*kernel)(Arguments...), const Launch& launch, void** arguments) {
    return call(kernel, launch, arguments, std::index_sequence_for<Arguments...>());
}

}  // namespace hostcuda
