// Global memory traffic, as the coalescing hardware sees it: the accesses that the lanes of one
// warp make at one call site, the same time round, are one instruction. Since every lane calls the
// helpers of cuda/memory.cuh alike, the k-th load of 16 bytes of each lane is such an instruction.
#include "count.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace hostcuda {
#ifdef HOSTCUDA_COUNT

static constexpr int WIDTHS = 5;  // 1 to 16 bytes
static constexpr int SITES = WIDTHS * 2;
static constexpr int SECTOR = 32;

struct Instruction {
    int lanes = 0;
    uint64_t address[WARP];
};
struct Warp {
    std::vector<Instruction> sites[SITES];  // by occurrence
    uint32_t occurrences[SITES][WARP];
};
struct Totals {
    uint64_t instructions, lanes, bytes, sectors, block_sectors;
};

static std::vector<Warp> warps;
static const uint64_t* ranges;  // (address, bytes) of each argument
static int arguments;
static std::vector<Totals> totals;                  // loads of each argument, then stores
static std::vector<std::vector<uint64_t>> touched;  // sectors, by this block; the same order

void count_access(const void* address, int bytes, bool store, bool active) {
    Warp& warp = warps[current->warp];
    int width = __builtin_ctz(bytes);
    if (1 << width != bytes || width >= WIDTHS) fail("an access of no width that a GPU has");
    int site = store * WIDTHS + width;
    uint32_t occurrence = warp.occurrences[site][current->lane]++;
    if (!active) return;
    auto& list = warp.sites[site];
    if (list.size() <= occurrence) list.resize(occurrence + 1);
    Instruction& one = list[occurrence];
    one.address[one.lanes++] = (uint64_t)address;
}

static int argument_of(uint64_t address) {
    for (int i = 0; i < arguments; i++)
        if (address - ranges[2 * i] < ranges[2 * i + 1]) return i;
    return arguments;
}

void count_start(const Launch& launch) {
    ranges = launch.ranges;
    arguments = launch.arguments;
    totals.assign(2 * (arguments + 1), Totals{});
    touched.assign(totals.size(), {});
    warps.resize((thread_count + WARP - 1) / WARP);
    for (Warp& warp : warps) {
        for (auto& list : warp.sites) list.clear();
        std::memset(warp.occurrences, 0, sizeof warp.occurrences);
    }
}

static const char* add(int bytes, bool store, const Instruction& one) {
    int argument = argument_of(one.address[0]), which = argument + store * (arguments + 1);
    if (argument_of(one.address[one.lanes - 1]) != argument)
        return "lanes of a warp access different arrays at once";
    std::vector<uint64_t>& block = touched[which];
    size_t first = block.size();
    for (int i = 0; i < one.lanes; i++) {
        uint64_t last = (one.address[i] + bytes - 1) / SECTOR;
        for (uint64_t s = one.address[i] / SECTOR; s <= last; s++)
            if (block.size() == first || block.back() != s) block.push_back(s);
    }
    auto begin = block.begin() + first;
    if (!std::is_sorted(begin, block.end())) std::sort(begin, block.end());
    block.erase(std::unique(begin, block.end()), block.end());
    Totals& t = totals[which];
    t.instructions++;
    t.lanes += one.lanes;
    t.bytes += (uint64_t)one.lanes * bytes;
    t.sectors += block.size() - first;
    return nullptr;
}

// Lanes that skip a call would be matched with the wrong calls of the others ever after.
static const char* check(const Warp& warp) {
    int lanes = &warp == &warps.back() ? (thread_count - 1) % WARP + 1 : WARP;
    for (int site = 0; site < SITES; site++)
        for (int lane = 1; lane < lanes; lane++)
            if (warp.occurrences[site][lane] != warp.occurrences[site][0]) {
                static char text[200];
                std::snprintf(text, sizeof text, "lanes of a warp differ in how often they call"
                              " the helpers to %s %d bytes: %u and %u times",
                              site / WIDTHS ? "store" : "load", 1 << site % WIDTHS,
                              warp.occurrences[site][0], warp.occurrences[site][lane]);
                return text;
            }
    return nullptr;
}

const char* count_block() {
    for (Warp& warp : warps) {
        if (const char* wrong = check(warp)) return wrong;
        for (int site = 0; site < SITES; site++) {
            for (const Instruction& one : warp.sites[site])
                if (one.lanes)
                    if (const char* wrong = add(1 << site % WIDTHS, site / WIDTHS, one))
                        return wrong;
            warp.sites[site].clear();
        }
        std::memset(warp.occurrences, 0, sizeof warp.occurrences);
    }
    for (size_t i = 0; i < touched.size(); i++) {
        std::sort(touched[i].begin(), touched[i].end());
        totals[i].block_sectors +=
            std::unique(touched[i].begin(), touched[i].end()) - touched[i].begin();
        touched[i].clear();
    }
    return nullptr;
}

extern "C" void hostcuda_totals(Totals* out) { std::copy(totals.begin(), totals.end(), out); }

#else
void count_access(const void*, int, bool, bool) {}
#endif
}  // namespace hostcuda
