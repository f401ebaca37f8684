"""The machine: runs the blocks of one launch, a warp at a time, an instruction for all its lanes.

Lanes that are at the same instruction go on together; of several such groups the one that is
furthest behind goes first, so that they meet again (with `split`, any part of any group). A warp
runs until its turn is over or all its lanes wait; blocks that are resident together take turns, in
random order with `shuffle`. No result may depend on that.
"""

from __future__ import annotations

import numpy as np

from . import lanes as f
from . import memory
from .compiled import entry, inside, pasted
from .lanes import ALL, ONE, ZERO
from .memory import fault
from .program import (
    ARITHMETIC,
    CODES,
    D0,
    D1,
    FIELDS,
    NEG,
    OP,
    PRED,
    SIZE,
    VEC,
    A,
    B,
    C,
    E,
    J,
    K,
)
from .words import (
    BLOCKS,
    FENCES,
    GRID_X,
    GRID_Y,
    INSTRUCTIONS,
    LANES,
    LIVE,
    NEXT,
    QUANTUM,
    RANDOM,
    ROW_X,
    ROWS,
    SHARED_SIZE,
    SHUFFLE,
    SLOTS,
    SPLIT,
    THREADS,
    WARPS,
    bits,
    put,
    put_bits,
    word,
)

_FIELDS = len(FIELDS)
_NEVER = 1 << 60
RUNS, AT_BARRIER, AT_WARP_OPERATION, ENDED = range(4)
PACK, UNPACK, LOAD, STORE, ATOMIC, COPY, COMMIT, WAIT = (
    CODES[name] for name in ["pack", "unpack", "load", "store", "atomic", "copy", "commit", "wait"]
)
FENCE, BRANCH, EXIT, BARRIER, SYNC_WARP, SHUFFLE_OP, VOTE, NOTHING = (
    CODES[name]
    for name in ["fence", "branch", "exit", "barrier", "sync_warp", "shuffle", "vote", "nothing"]
)
UP, DOWN, BUTTERFLY, INDEX = range(4)
ANY_OF, ALL_OF, BALLOT = range(3)
assert CODES["insert"] == len(ARITHMETIC) - 1


@inside
def random(s, below):
    """xorshift64*: of 0 to below - 1."""
    x = bits(s.totals, RANDOM)
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    put_bits(s.totals, RANDOM, x)
    return np.int64(((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)) % np.uint64(below))


@inside
def each(r, m, ins, function):
    """A function of lanes.py, in every active lane."""
    d, a, b, c = word(ins, D0) * 32, word(ins, A) * 32, word(ins, B) * 32, word(ins, C) * 32
    k, j = bits(ins, K), bits(ins, J)
    for lane in range(32):
        x = function(bits(r, a + lane), bits(r, b + lane), bits(r, c + lane), k, j)
        on = bits(m, lane)
        put_bits(r, d + lane, (x & on) | (bits(r, d + lane) & ~on))


@inside
def insert(r, m, ins):
    d, a, b, c = word(ins, D0) * 32, word(ins, A) * 32, word(ins, B) * 32, word(ins, C) * 32
    e, k = word(ins, E) * 32, bits(ins, K)
    for lane in range(32):
        x = f.insert(bits(r, a + lane), bits(r, b + lane), bits(r, c + lane), bits(r, e + lane), k)
        on = bits(m, lane)
        put_bits(r, d + lane, (x & on) | (bits(r, d + lane) & ~on))


@inside
def pack(r, m, ins):
    size, d = np.uint64(word(ins, SIZE)), word(ins, D0) * 32
    for i in range(word(ins, VEC)):
        a, shift, before = word(ins, A + i) * 32, size * np.uint64(i), ALL if i else ZERO
        for lane in range(32):
            on, old = bits(m, lane), bits(r, d + lane)
            part = (bits(r, a + lane) & ((ONE << size) - ONE)) << shift
            put_bits(r, d + lane, (((old & before) | part) & on) | (old & ~on))


@inside
def unpack(r, m, ins):
    size, a = np.uint64(word(ins, SIZE)), word(ins, A) * 32
    for i in range(word(ins, VEC)):
        d, shift = word(ins, D0 + i) * 32, size * np.uint64(i)
        if d >= 0:
            for lane in range(32):
                x = (bits(r, a + lane) >> shift) & ((ONE << size) - ONE)
                on = bits(m, lane)
                put_bits(r, d + lane, (x & on) | (bits(r, d + lane) & ~on))


# ---- warp operations -----------------------------------------------------------------------------


@inside
def _source(kind, lane, b, c):
    """The lane that a lane reads in a shuffle; -1: it is its own."""
    segment, clamp = (c >> 8) & 31, c & 31
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    if kind == UP:
        j = lane - b
        return j if j >= last else -1
    j = lane + b if kind == DOWN else lane ^ b if kind == BUTTERFLY else first | (b & ~segment)
    return j if j <= last else -1


@inside
def _shuffle(s, r, ins, mask):
    """For the lanes of the mask: 0, or a fault."""
    kind, d, p = word(ins, J), word(ins, D0) * 32, word(ins, D1) * 32
    a, b, c = word(ins, A) * 32, word(ins, B) * 32, word(ins, C) * 32
    for lane in range(32):
        put_bits(s.masks, 64 + lane, bits(r, a + lane))
    for lane in range(32):
        if (mask >> np.uint64(lane)) & ONE:
            j = _source(kind, lane, word(r, b + lane) & 31, word(r, c + lane))
            own = j < 0
            j = lane if own else j
            if not (mask >> np.uint64(j)) & ONE:
                return fault(s, 17, lane, mask)
            put_bits(r, d + lane, bits(s.masks, 64 + j))
            if p >= 0:
                put_bits(r, p + lane, ZERO if own else ONE)
    return 0


@inside
def _vote(s, r, ins, mask):
    kind, d, a, negated = word(ins, J), word(ins, D0) * 32, word(ins, A) * 32, bits(ins, K)
    found = ZERO
    for lane in range(32):
        here = (mask >> np.uint64(lane)) & ((bits(r, a + lane) & ONE) ^ negated) & ONE
        found |= here << np.uint64(lane)
    if kind == ANY_OF:
        found = ONE if found else ZERO
    elif kind == ALL_OF:
        found = ONE if found == mask else ZERO
    for lane in range(32):
        if (mask >> np.uint64(lane)) & ONE:
            put_bits(r, d + lane, found)
    return 0


@inside
def _mask_there(s, r, ins, slot, warp, pc, mask, of):
    """Whether all lanes of a mask wait at this instruction: 1, or 0, or a fault below 0."""
    e, threads = word(ins, E) * 32, word(s.settings, THREADS)
    base = slot * threads + warp * 32
    for lane in range(32):
        if (mask >> np.uint64(lane)) & ONE:
            if warp * 32 + lane >= threads:
                return -fault(s, 18, of, mask)
            if word(s.status, base + lane) != AT_WARP_OPERATION or word(s.pc, base + lane) != pc:
                return 0
            if bits(r, e + lane) & f.LOW32 != mask:
                return -fault(s, 19, lane, mask)
    return 1


@inside
def _together(s, r, ins, slot, warp, mask, every):
    """What the lanes of a mask do, of all lanes or not: 0, or a fault."""
    op = word(ins, OP)
    if op == SHUFFLE_OP:
        return _shuffle(s, r, ins, mask)
    if op == VOTE:
        return _vote(s, r, ins, mask)
    if every:
        at = slot * word(s.settings, WARPS) + warp
        put(s.warp_epoch, at, word(s.warp_epoch, at) + 1)
    return 0


@inside
def _names_all(r, ins):
    """Whether the mask of every lane names all 32."""
    e, found = word(ins, E) * 32, f.LOW32
    for lane in range(32):
        found &= bits(r, e + lane)
    return found == f.LOW32


@inside
def warp_operation(s, r, ins, slot, warp, pc):
    """Lanes have come to it: does it for every mask that is complete. 0, or a fault."""
    base, e = slot * word(s.settings, THREADS) + warp * 32, word(ins, E) * 32
    lanes = min(32, word(s.settings, THREADS) - warp * 32)
    for lane in range(lanes):
        if word(s.status, base + lane) != AT_WARP_OPERATION or word(s.pc, base + lane) != pc:
            continue
        mask = bits(r, e + lane) & f.LOW32
        if not (mask >> np.uint64(lane)) & ONE:
            return fault(s, 15, lane, mask)
        there = _mask_there(s, r, ins, slot, warp, pc, mask, lane)
        if there < 0:
            return -there
        if there:
            wrong = _together(s, r, ins, slot, warp, mask, mask == f.LOW32 or lanes < 32)
            if wrong:
                return wrong
            for i in range(lanes):
                if (mask >> np.uint64(i)) & ONE:
                    put(s.status, base + i, RUNS)
                    put(s.pc, base + i, pc + 1)
    return 0


# ---- a warp --------------------------------------------------------------------------------------


@pasted
def arithmetic(op, r, m, ins):
    """In the order of program.ARITHMETIC: a test compares."""
    if op == 0:
        each(r, m, ins, f.move)
    elif op == 1:
        each(r, m, ins, f.add)
    elif op == 2:
        each(r, m, ins, f.sub)
    elif op == 3:
        each(r, m, ins, f.mul_lo)
    elif op == 4:
        each(r, m, ins, f.mad_lo)
    elif op == 5:
        each(r, m, ins, f.mul_wide)
    elif op == 6:
        each(r, m, ins, f.mad_wide)
    elif op == 7:
        each(r, m, ins, f.mul_hi)
    elif op == 8:
        each(r, m, ins, f.div_u)
    elif op == 9:
        each(r, m, ins, f.rem_u)
    elif op == 10:
        each(r, m, ins, f.div_s)
    elif op == 11:
        each(r, m, ins, f.rem_s)
    elif op == 12:
        each(r, m, ins, f.min_of)
    elif op == 13:
        each(r, m, ins, f.max_of)
    elif op == 14:
        each(r, m, ins, f.bit_and)
    elif op == 15:
        each(r, m, ins, f.bit_or)
    elif op == 16:
        each(r, m, ins, f.bit_xor)
    elif op == 17:
        each(r, m, ins, f.bit_not)
    elif op == 18:
        each(r, m, ins, f.negate)
    elif op == 19:
        each(r, m, ins, f.absolute)
    elif op == 20:
        each(r, m, ins, f.shift_left)
    elif op == 21:
        each(r, m, ins, f.shift_right)
    elif op == 22:
        each(r, m, ins, f.shift_right_s)
    elif op == 23:
        each(r, m, ins, f.funnel_left)
    elif op == 24:
        each(r, m, ins, f.funnel_right)
    elif op == 25:
        each(r, m, ins, f.extract)
    elif op == 26:
        each(r, m, ins, f.permute)
    elif op == 27:
        each(r, m, ins, f.select)
    elif op == 28:
        each(r, m, ins, f.logic3)
    elif op == 29:
        each(r, m, ins, f.count_ones)
    elif op == 30:
        each(r, m, ins, f.widen_s)
    elif op == 31:
        each(r, m, ins, f.compare_s)
    elif op == 32:
        each(r, m, ins, f.compare_u)
    elif op == 33:
        each(r, m, ins, f.add_f32)
    elif op == 34:
        each(r, m, ins, f.sub_f32)
    elif op == 35:
        each(r, m, ins, f.mul_f32)
    elif op == 36:
        each(r, m, ins, f.fma_f32)
    elif op == 37:
        each(r, m, ins, f.div_f32)
    elif op == 38:
        each(r, m, ins, f.rcp_f32)
    elif op == 39:
        each(r, m, ins, f.sqrt_f32)
    elif op == 40:
        each(r, m, ins, f.neg_f32)
    elif op == 41:
        each(r, m, ins, f.abs_f32)
    elif op == 42:
        each(r, m, ins, f.min_f32)
    elif op == 43:
        each(r, m, ins, f.max_f32)
    elif op == 44:
        each(r, m, ins, f.compare_f32)
    elif op == 45:
        each(r, m, ins, f.add_f64)
    elif op == 46:
        each(r, m, ins, f.sub_f64)
    elif op == 47:
        each(r, m, ins, f.mul_f64)
    elif op == 48:
        each(r, m, ins, f.fma_f64)
    elif op == 49:
        each(r, m, ins, f.div_f64)
    elif op == 50:
        each(r, m, ins, f.rcp_f64)
    elif op == 51:
        each(r, m, ins, f.sqrt_f64)
    elif op == 52:
        each(r, m, ins, f.neg_f64)
    elif op == 53:
        each(r, m, ins, f.abs_f64)
    elif op == 54:
        each(r, m, ins, f.compare_f64)
    elif op == 55:
        each(r, m, ins, f.f32_of_f16)
    elif op == 56:
        each(r, m, ins, f.f16_of_f32)
    elif op == 57:
        each(r, m, ins, f.bf16_of_f32)
    elif op == 58:
        each(r, m, ins, f.two_f16_of_f32)
    elif op == 59:
        each(r, m, ins, f.two_bf16_of_f32)
    elif op == 60:
        each(r, m, ins, f.f32_of_bf16)
    elif op == 61:
        each(r, m, ins, f.f64_of_f32)
    elif op == 62:
        each(r, m, ins, f.f32_of_f64)
    elif op == 63:
        each(r, m, ins, f.f32_of_u)
    elif op == 64:
        each(r, m, ins, f.f32_of_s)
    elif op == 65:
        each(r, m, ins, f.f64_of_u)
    elif op == 66:
        each(r, m, ins, f.f64_of_s)
    else:
        insert(r, m, ins)


@pasted
def effect(s, op, r, m, ins, slot, warp):
    """What is neither arithmetic of lanes nor changes where they are: 0, or a fault."""
    if op == LOAD:
        return memory.access(s, r, m, ins, slot, warp, 0)
    if op == STORE:
        return memory.access(s, r, m, ins, slot, warp, 1)
    if op == PACK:
        pack(r, m, ins)
    elif op == UNPACK:
        unpack(r, m, ins)
    elif op == ATOMIC:
        return memory.atomic(s, r, m, ins, slot, warp)
    elif op == COPY:
        return memory.copy(s, r, m, ins, slot, warp)
    elif op == COMMIT:
        memory.commit(s, m, slot, warp)
    elif op == WAIT:
        memory.wait(s, m, ins, slot, warp)
    elif op == FENCE:
        if word(ins, J):
            for lane in range(32):
                if bits(m, lane):
                    memory.fence(s, slot, warp * 32 + lane)
    elif op != NOTHING:
        return fault(s, 23, 0, np.uint64(op))
    return 0


@inside
def _choose_group(s, m, base, lanes):
    """Sets the mask of the lanes that go on: where they are, and where the next others are."""
    pc, others = _NEVER, _NEVER
    for lane in range(lanes):
        if word(s.status, base + lane) == RUNS:
            pc = min(pc, word(s.pc, base + lane))
    split = word(s.settings, SPLIT)
    if split and pc < _NEVER:
        start = random(s, lanes)
        for i in range(lanes):
            lane = (start + i) % lanes
            if word(s.status, base + lane) == RUNS:
                pc = word(s.pc, base + lane)
                break
    active = 0
    for lane in range(32):
        on = ZERO
        if lane < lanes and word(s.status, base + lane) == RUNS:
            here = word(s.pc, base + lane)
            if here == pc and not (split and active and random(s, 2)):
                on = ALL
                active += 1
            elif here > pc:
                others = min(others, here)
            else:
                others = pc  # a part of the group, or one behind it: one step, and choose again
        put_bits(m, lane, on)
    return pc, others, active


@inside
def _leave(s, m, base, pc):
    """The group's lanes are at pc."""
    for lane in range(32):
        if bits(m, lane):
            put(s.pc, base + lane, pc)


@inside
def _wait_at(s, m, base, pc, status):
    for lane in range(32):
        if bits(m, lane):
            put(s.status, base + lane, status)
            put(s.pc, base + lane, pc)


@inside
def _predicated(r, m, e, ins):
    """The lanes for which an instruction counts, into e: their number."""
    row, negated, active = word(ins, PRED) * 32, bits(ins, NEG), 0
    for lane in range(32):
        on = bits(m, lane) & (ZERO - ((bits(r, row + lane) & ONE) ^ negated))
        put_bits(e, lane, on)
        active += np.int64(on & ONE)
    return active


@pasted
def run_warp(s, slot, warp, turn):
    """Up to so many instructions. Returns how many it did; below 0: a fault."""
    threads = word(s.settings, THREADS)
    base, lanes = slot * threads + warp * 32, min(32, threads - warp * 32)
    r = s.registers + (slot * word(s.settings, WARPS) + warp) * word(s.settings, ROWS) * 256
    group, some = s.masks, s.masks + 256
    done = 0
    while done < turn:
        pc, others, active = _choose_group(s, group, base, lanes)
        if pc == _NEVER:
            break
        together = True
        while together:
            if done >= turn:
                _leave(s, group, base, pc)
                break
            ins = s.code + pc * (8 * _FIELDS)
            op = word(ins, OP)
            done += 1
            m, on = group, active
            if word(ins, PRED) >= 0:
                m, on = some, _predicated(r, group, some, ins)
                if on == 0:
                    pc += 1
                    if pc >= others:
                        _leave(s, group, base, pc)
                        together = False
                    continue
            put(s.totals, LANES, word(s.totals, LANES) + on)
            if op < PACK:
                arithmetic(op, r, m, ins)
                pc += 1
            elif op == BRANCH:
                if on == active:
                    pc = word(ins, J)
                else:
                    _leave(s, group, base, pc + 1)
                    _leave(s, m, base, word(ins, J))
                    together = False
                    continue
            elif op in (EXIT, BARRIER):
                _leave(s, group, base, pc + 1)
                _wait_at(s, m, base, pc, ENDED if op == EXIT else AT_BARRIER)
                together = False
                continue
            elif op in (SHUFFLE_OP, VOTE, SYNC_WARP) and on == 32 and _names_all(r, ins):
                if _together(s, r, ins, slot, warp, f.LOW32, True):
                    put(s.fault, 3, pc)
                    return -1
                pc += 1
            elif op in (SHUFFLE_OP, VOTE, SYNC_WARP):
                _leave(s, group, base, pc + 1)
                _wait_at(s, m, base, pc, AT_WARP_OPERATION)
                if warp_operation(s, r, ins, slot, warp, pc):
                    put(s.fault, 3, pc)
                    return -1
                together = False
                continue
            else:
                if effect(s, op, r, m, ins, slot, warp):
                    put(s.fault, 3, pc)
                    return -1
                pc += 1
            if pc >= others:
                _leave(s, group, base, pc)
                together = False
    put(s.totals, INSTRUCTIONS, word(s.totals, INSTRUCTIONS) + done)
    return done


# ---- blocks --------------------------------------------------------------------------------------


@inside
def start_block(s, slot):
    """The next one, in this slot."""
    number = word(s.order, word(s.totals, NEXT))
    put(s.totals, NEXT, word(s.totals, NEXT) + 1)
    put(s.totals, LIVE, word(s.totals, LIVE) + 1)
    put(s.block, slot, number)
    put(s.epoch, slot, word(s.epoch, slot) + 1)
    put(s.born, slot, word(s.epoch, slot))
    put(s.pendings, slot, 0)
    put(s.copying, slot, 0)
    x, y = word(s.settings, GRID_X), word(s.settings, GRID_Y)
    threads, warps = word(s.settings, THREADS), word(s.settings, WARPS)
    for i in range(slot * threads, (slot + 1) * threads):
        put(s.pc, i, 0)
        put(s.status, i, RUNS)
        put(s.seen, i, 0)
        put(s.acquired, i, 0)
        put(s.group, i, 0)
    for axis in range(3):
        row = word(s.settings, ROW_X + axis)
        if row >= 0:
            value = number % x if axis == 0 else number // x % y if axis == 1 else number // (x * y)
            for warp in range(warps):
                at = ((slot * warps + warp) * word(s.settings, ROWS) + row) * 32
                for lane in range(32):
                    put(s.registers, at + lane, value)
    size = word(s.settings, SHARED_SIZE) // 8
    for i in range(slot * size, (slot + 1) * size):
        put(s.shared, i, -1)  # NaN, of whatever type


@inside
def _fault_at(s, kind, slot, thread):
    fault(s, kind, thread & 31, ZERO)
    put(s.fault, 3, word(s.pc, slot * word(s.settings, THREADS) + thread))
    put(s.fault, 5, thread >> 5)


@inside
def settle(s, slot):
    """No thread of the block can go on: ends it, or opens its barrier. Below 0: a fault."""
    threads = word(s.settings, THREADS)
    base, ended, waiting, place = slot * threads, 0, 0, -1
    for t in range(threads):
        status = word(s.status, base + t)
        if status == AT_WARP_OPERATION:
            _fault_at(s, 16, slot, t)
            return -1
        if status == ENDED:
            ended += 1
        else:
            if place >= 0 and word(s.pc, base + t) != place:
                _fault_at(s, 13, slot, t)
                return -1
            place, waiting = word(s.pc, base + t), t
    if ended == threads:
        put(s.block, slot, -1)
        put(s.totals, LIVE, word(s.totals, LIVE) - 1)
        return 0
    if ended:
        _fault_at(s, 14, slot, waiting)
        return -1
    put(s.epoch, slot, word(s.epoch, slot) + 1)
    if word(s.settings, FENCES):
        memory.join(s, slot)
    for t in range(threads):
        put(s.pc, base + t, place + 1)
        put(s.status, base + t, RUNS)
    return 0


@entry
def advance(s, budget):
    """Runs the launch for so many instructions of warps. 0: it ended; 1: not yet; -1: a fault."""
    slots, warps = word(s.settings, SLOTS), word(s.settings, WARPS)
    shuffle, quantum = word(s.settings, SHUFFLE), word(s.settings, QUANTUM)
    while budget > 0:
        waiting = word(s.totals, NEXT) < word(s.settings, BLOCKS)
        if waiting and word(s.totals, LIVE) < slots:
            for i in range(slots):
                if word(s.block, i) < 0 and word(s.totals, NEXT) < word(s.settings, BLOCKS):
                    start_block(s, i)
        if word(s.totals, LIVE) == 0:
            return 0
        slot = random(s, slots) if shuffle else 0
        while word(s.block, slot) < 0:
            slot = (slot + 1) % slots
        first, did = random(s, warps) if shuffle else 0, 0
        for i in range(warps):
            warp = (first + i) % warps
            turn = 1 + random(s, quantum) if shuffle else budget
            done = run_warp(s, slot, warp, turn)
            if done < 0:
                put(s.fault, 4, slot)
                put(s.fault, 5, warp)
                return -1
            did += done
        budget -= did
        if did == 0 and settle(s, slot) < 0:
            put(s.fault, 4, slot)
            return -1
    return 1
