// The scheduler: who goes on after a barrier or warp operation, and who never can.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "count.h"
#include "fibres.h"

namespace hostcuda {

Thread* current;
Thread* threads;
int thread_count;
uint3 block_index;
dim3 block_size, grid_size;
unsigned char* dynamic_shared;
uint64_t block_serial;
int barrier_count;

static const char* kernel_name;
static std::string message;
static bool failed;

void wait(State state, const char* operation, const char* file, int line) {
    Thread& t = *current;
    t.operation = operation;
    t.file = file;
    t.line = line;
    t.state = state;
    yield();
}

[[gnu::no_sanitize("address", "undefined")]] void poison(void* shared, size_t bytes) {
    // volatile: a plain loop would become memset, which AddressSanitizer watches
    for (size_t i = 0; i < bytes; i++) ((volatile unsigned char*)shared)[i] = 0xff;
}

// --- messages --------------------------------------------------------------------------------

static std::string where(const Thread& t) {
    char text[400];
    int n = std::snprintf(text, sizeof text, "thread (%u,%u,%u) of warp %d, lane %d", t.index.x,
                          t.index.y, t.index.z, t.warp, t.lane);
    if (t.state == State::running) return text;
    if (t.state == State::done) return std::string(text) + ": has ended";
    n += std::snprintf(text + n, sizeof text - n, ": %s at %s:%d", t.operation, t.file, t.line);
    if (t.state == State::at_warp_operation)
        std::snprintf(text + n, sizeof text - n, " for mask 0x%08x", t.mask);
    return text;
}

static bool fail_at(const char* what, std::string first, std::string second) {
    char place[400];
    std::snprintf(place, sizeof place, "%s in kernel %s, block (%u,%u,%u)", what, kernel_name,
                  block_index.x, block_index.y, block_index.z);
    message = place;
    for (const std::string& more : {first, second})
        if (!more.empty()) message += "; " + more;
    failed = true;
    return false;
}

void fail(const char* what) {
    fail_at(what, where(*current), "");
    current->state = State::done;
    yield();
}

// --- letting waiting threads go on -----------------------------------------------------------

static bool same_operation(const Thread& a, const Thread& b) {
    return a.state == b.state && a.line == b.line && !std::strcmp(a.operation, b.operation) &&
           !std::strcmp(a.file, b.file);
}

// The thread that `t`, at a warp operation, waits for in vain; null if everyone has come.
static Thread* missing(const Thread& t, int first, int last) {
    for (int i = first; i < last; i++) {
        Thread& other = threads[i];
        if (!(t.mask >> other.lane & 1) || other.state == State::done) continue;
        if (!same_operation(t, other) || other.mask != t.mask) return &other;
    }
    return nullptr;
}

static void let_go(unsigned mask, int first, int last) {
    unsigned group = 0;
    for (int i = first; i < last; i++)
        if (threads[i].state != State::done) group |= mask & 1u << threads[i].lane;
    for (int i = first; i < last; i++) {
        Thread& t = threads[i];
        if (!(group >> t.lane & 1)) continue;
        t.value = t.offer;
        t.group = group;
        t.state = State::running;
    }
}

// Called when no thread of the warp can run: lets whole groups go; false: nobody waits here.
static bool release_warp(int warp) {
    int first = warp * WARP, last = std::min(thread_count, first + WARP);
    bool released = false;
    Thread* stuck = nullptr;
    for (int i = first; i < last; i++) {
        Thread& t = threads[i];
        if (t.state != State::at_warp_operation) continue;
        if (!(t.mask >> t.lane & 1)) return fail_at("a lane outside its own mask", where(t), "");
        if (missing(t, first, last)) {
            stuck = &t;
            continue;
        }
        let_go(t.mask, first, last);
        released = true;
    }
    if (stuck && !released)
        return fail_at("divergent warp operation", where(*stuck),
                       where(*missing(*stuck, first, last)));
    return released;
}

// Called when no thread of the block can run and no warp operation is open.
static bool release_block() {
    barrier_count = 0;
    for (int i = 0; i < thread_count; i++) {
        Thread& t = threads[i];
        if (!same_operation(t, threads[0])) {
            Thread &waiting = threads[0].state == State::done ? t : threads[0],
                   &other = &waiting == &t ? threads[0] : t;
            return fail_at("divergent barrier", where(waiting), where(other));
        }
        barrier_count += t.offer != 0;
    }
    for (int i = 0; i < thread_count; i++) threads[i].state = State::running;
    return true;
}

// --- running ---------------------------------------------------------------------------------

static void run_in_order() {
    for (int first = 0; first < thread_count && !failed; first += WARP) {
        int last = std::min(thread_count, first + WARP);
        do {
            for (int i = first; i < last && !failed; i++)
                if (threads[i].state == State::running) resume(threads[i]);
        } while (!failed && release_warp(first / WARP));
    }
}

// What no barrier orders happens in another order: now one warp runs far ahead of the others, now
// they take turns, now some lanes of a warp lag behind the rest of it.
static void run_shuffled(std::mt19937& random) {
    std::vector<int> warps((thread_count + WARP - 1) / WARP), lanes;
    for (size_t i = 0; i < warps.size(); i++) warps[i] = (int)i;
    while (!warps.empty() && !failed) {
        int& warp = warps[random() % warps.size()];
        int first = warp * WARP, last = std::min(thread_count, first + WARP);
        unsigned turns = random() % 2 ? ~0u : 1 + random() % 4;
        for (; turns && !failed; turns--) {
            lanes.clear();
            for (int i = first; i < last; i++)
                if (threads[i].state == State::running) lanes.push_back(i);
            if (lanes.empty() && release_warp(warp)) continue;
            if (lanes.empty()) {  // all of it at a barrier or done
                warp = warps.back();
                warps.pop_back();
                break;
            }
            std::shuffle(lanes.begin(), lanes.end(), random);
            if (random() % 4 == 0) lanes.resize(1 + random() % lanes.size());
            for (int i : lanes)
                if (!failed) resume(threads[i]);
        }
    }
}

static void run_block(std::mt19937& random) {
    block_serial++;
    for (int i = 0; i < thread_count; i++) {
        Thread& t = threads[i];
        t.state = State::running;
        t.index = {i % block_size.x, i / block_size.x % block_size.y,
                   i / (block_size.x * block_size.y)};
        t.warp = i / WARP;
        t.lane = i % WARP;
    }
    bool done = false;
    while (!failed && !done) {
#ifdef HOSTCUDA_SHUFFLE
        run_shuffled(random);
#else
        run_in_order();
#endif
        done = std::all_of(threads, threads + thread_count,
                           [](Thread& t) { return t.state == State::done; });
        if (!failed && !done) release_block();
    }
}

const char* run(const Launch& launch, void (*kernel)(void*), void* arguments) {
    kernel_name = launch.kernel;
    block_size = launch.block;
    grid_size = launch.grid;
    failed = false;
    reserve_fibres(launch.block.x * launch.block.y * launch.block.z, kernel, arguments);
    // exactly as large as asked for, so that the address sanitizer sees one byte too many
    dynamic_shared = (unsigned char*)std::aligned_alloc(16, (launch.dynamic_shared + 15) / 16 * 16);
    std::mt19937 random(launch.seed);
    uint64_t plane = (uint64_t)launch.grid.x * launch.grid.y, blocks = plane * launch.grid.z;
    count_start(launch);
#ifdef HOSTCUDA_SHUFFLE
    uint64_t offset = random() % blocks;
    bool backwards = random() % 2;
#endif
    for (uint64_t i = 0; i < blocks && !failed; i++) {
        uint64_t b = i;
#ifdef HOSTCUDA_SHUFFLE
        b = (i + offset) % blocks;
        if (backwards) b = blocks - 1 - b;
#endif
        block_index = {(unsigned)(b % launch.grid.x), (unsigned)(b / launch.grid.x % launch.grid.y),
                       (unsigned)(b / plane)};
        poison(dynamic_shared, launch.dynamic_shared);
        run_block(random);
        const char* wrong = failed ? nullptr : count_block();
        if (wrong) fail_at(wrong, "", "");
    }
    std::free(dynamic_shared);
    if (failed) restart_fibres();
    return failed ? message.c_str() : nullptr;
}

}  // namespace hostcuda
