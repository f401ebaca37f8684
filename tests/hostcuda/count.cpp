// Global memory traffic, as the coalescing hardware sees it: the accesses that the lanes of one
// warp make at one call site, the same time round, are one instruction. A call site here is an
// array, a width and a direction: the helpers of cuda/memory.cuh call on every lane alike.
#include "count.h"

#include <algorithm>
#include <cstdio>
#include <vector>

namespace hostcuda {
#ifdef HOSTCUDA_COUNT

static constexpr int ARRAYS = 16, WIDTHS = 5;  // 1 to 16 bytes
static constexpr int SITES = ARRAYS * WIDTHS * 2;
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
static Totals totals[ARRAYS * 2];                 // loads and stores of each array
static std::vector<uint64_t> touched[ARRAYS * 2];  // sectors, by this block

void count_access(int array, const void* address, int bytes, bool active, bool write) {
    Warp& warp = warps[current->warp];
    int width = __builtin_ctz(bytes);
    if ((unsigned)array >= ARRAYS || 1 << width != bytes || width >= WIDTHS)
        fail("an access that the traffic count has no place for");
    int site = (array * 2 + write) * WIDTHS + width;
    uint32_t occurrence = warp.occurrences[site][current->lane]++;
    if (!active) return;
    auto& list = warp.sites[site];
    if (list.size() <= occurrence) list.resize(occurrence + 1);
    Instruction& one = list[occurrence];
    one.address[one.lanes++] = (uint64_t)address;
}

void count_start() {
    std::memset(totals, 0, sizeof totals);
    warps.resize((thread_count + WARP - 1) / WARP);
    for (Warp& warp : warps) {
        for (auto& list : warp.sites) list.clear();
        std::memset(warp.occurrences, 0, sizeof warp.occurrences);
    }
}

static void add(int which, int bytes, const Instruction& one) {
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
}

// Lanes that skip a call would be matched with the wrong calls of the others ever after.
static const char* check(const Warp& warp) {
    int lanes = &warp == &warps.back() ? (thread_count - 1) % WARP + 1 : WARP;
    for (int site = 0; site < SITES; site++)
        for (int lane = 1; lane < lanes; lane++)
            if (warp.occurrences[site][lane] != warp.occurrences[site][0]) {
                static char text[120];
                std::snprintf(text, sizeof text, "array %d, %s of %d bytes: lanes of a warp differ"
                              " in how often they call cupybn_host_access", site / WIDTHS / 2,
                              site / WIDTHS % 2 ? "stores" : "loads", 1 << site % WIDTHS);
                return text;
            }
    return nullptr;
}

const char* count_block() {
    for (Warp& warp : warps) {
        if (const char* wrong = check(warp)) return wrong;
        for (int site = 0; site < SITES; site++) {
            for (const Instruction& one : warp.sites[site])
                if (one.lanes) add(site / WIDTHS, 1 << site % WIDTHS, one);
            warp.sites[site].clear();
        }
        std::memset(warp.occurrences, 0, sizeof warp.occurrences);
    }
    for (int i = 0; i < ARRAYS * 2; i++) {
        std::sort(touched[i].begin(), touched[i].end());
        totals[i].block_sectors +=
            std::unique(touched[i].begin(), touched[i].end()) - touched[i].begin();
        touched[i].clear();
    }
    return nullptr;
}

extern "C" void hostcuda_totals(Totals* out) { std::memcpy(out, totals, sizeof totals); }

#else
void count_access(int, const void*, int, bool, bool) {}
#endif
}  // namespace hostcuda
