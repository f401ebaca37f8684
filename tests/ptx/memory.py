"""Loads, stores, atomics and copies of a warp, and all that is checked on the way.

Shared memory: every byte has a tag of the thread that wrote it last, and of those that read it
since, with the barrier epoch: who comes without a barrier between is a fault, in whatever order the
machine happened to run them.

Global memory: the same for what is written, by grains, the elements of the array. What another
block wrote may be used only if that block fenced and then did an atomic, and this one did an atomic
and then fenced; both may stand before or behind a barrier of theirs. That is PTX's memory model, in
which a store without it may land as late, and a load may be as old, as can be.
"""

from __future__ import annotations

import numpy as np

from .compiled import inside
from .lanes import ALL, LOW32, ONE, ZERO, load, signed, store
from .program import (
    ACQUIRE,
    ATOMICS,
    D0,
    GENERIC,
    RELAXED,
    RELEASE,
    SHARED,
    SIZE,
    SPACE,
    VEC,
    WINDOW,
    A,
    B,
    C,
    E,
    J,
    K,
)
from .words import (
    CLOCK,
    COPIES,
    COPY_FIELDS,
    COUNTING,
    FENCES,
    FIGURES,
    PENDING_FIELDS,
    PENDINGS,
    RACES,
    RANGE_FIELDS,
    RANGES,
    SECTORS,
    SHARED_SIZE,
    THREADS,
    UNINITIALISED,
    WARPS,
    bits,
    put,
    put_bits,
    word,
)

_WINDOW = np.uint64(WINDOW)
_IN_WINDOW = np.uint64(WINDOW - 1)
_SECTOR = np.uint64(5)
# A tag: epoch << 32 | warp epoch << 12 | several << 10 | thread
_THREAD, _EPOCH = 1023, 32
_IN_FLIGHT = 3 << 10
NOBODYS = -2  # bytes beside the variables
ADD, INC, DEC, EXCH, CAS, MIN, MAX, AND, OR, XOR = range(len(ATOMICS))


@inside
def fault(s, kind, lane, value):
    """Noted; the machine stops. Returns `kind`."""
    put(s.fault, 0, kind)
    put(s.fault, 1, lane)
    put_bits(s.fault, 2, value)
    return kind


@inside
def _addresses(s, r, m, row, offset, total):
    """Every active lane's, into scratch: the first, the last and whether one is crooked."""
    first, last, crooked = ALL, ZERO, ZERO
    for lane in range(32):
        if bits(m, lane):
            x = bits(r, row + lane) + np.uint64(offset)
            put_bits(s.masks, 64 + lane, x)
            first, last = min(first, x), max(last, x)
            crooked |= x
    return first, last, crooked & np.uint64(total - 1)


@inside
def _fault_of_lane(s, m, kind, total, crooked):
    """The fault of the first lane whose address is misaligned, or is in no range."""
    for lane in range(32):
        x = bits(s.masks, 64 + lane)
        if bits(m, lane):
            if crooked:
                wrong = (x & np.uint64(total - 1)) != ZERO
            else:
                wrong = range_of(s, x, x + np.uint64(total)) < 0
            if wrong:
                return fault(s, kind, lane, x)
    return 0


@inside
def range_of(s, begin, end):
    for i in range(word(s.settings, RANGES)):
        at = i * RANGE_FIELDS
        if begin >= bits(s.ranges, at) and end <= bits(s.ranges, at + 1):
            return i
    return -1


# ---- shared memory -------------------------------------------------------------------------------


@inside
def _unordered(tag, thread, epoch, warp_epoch):
    """Whether the tag's thread is another, and no barrier stands between."""
    if tag >> _EPOCH != epoch or tag & _THREAD == thread:
        return False
    same_warp = (tag & _THREAD) >> 5 == thread >> 5
    return not (same_warp and (tag >> 12) & 0xFFFFF < warp_epoch)


@inside
def _read_tag(tag, thread, epoch, warp_epoch):
    """The tag of the readers so far, and this one."""
    several = 0
    if tag >> _EPOCH == epoch and (tag & _THREAD != thread or (tag >> 10) & 3):
        if (tag & _THREAD) >> 5 != thread >> 5 or (tag >> 10) & 3 == 2:
            several = 2
        elif (tag >> 12) & 0xFFFFF >= warp_epoch:
            several = 1
    return epoch << _EPOCH | warp_epoch << 12 | several << 10 | thread


@inside
def _read_before(tag, thread, epoch, warp_epoch):
    """Whether another thread read it, and no barrier stands between."""
    if tag >> _EPOCH != epoch:
        return False
    several = (tag >> 10) & 3
    if several == 2:
        return True
    same_warp = (tag & _THREAD) >> 5 == thread >> 5
    if several == 0 and tag & _THREAD == thread:
        return False
    return not (same_warp and (tag >> 12) & 0xFFFFF < warp_epoch)


@inside
def check_shared(s, slot, warp, lane, x, total, writes):
    """The bytes of one lane's access: 0, or a fault."""
    size = word(s.settings, SHARED_SIZE)
    if x >= np.uint64(size) or x + np.uint64(total) > np.uint64(size):
        return fault(s, 4, lane, x)
    if not word(s.settings, RACES):
        return 0
    thread = warp * 32 + lane
    epoch, born = word(s.epoch, slot), word(s.born, slot)
    warp_epoch = word(s.warp_epoch, slot * word(s.settings, WARPS) + warp) & 0xFFFFF
    begin = slot * size + np.int64(x)
    end, first, readers = begin + total, word(s.shared_writer, begin), word(s.shared_reader, begin)
    others = 0
    for i in range(begin, end):
        others |= (word(s.shared_writer, i) ^ first) | (word(s.shared_reader, i) ^ readers)
    for i in range(begin, end if others else begin + 1):  # one for all, if they are alike
        tag = word(s.shared_writer, i)
        if tag == NOBODYS:
            return fault(s, 4, lane, x)
        if tag >> _EPOCH >= born:
            if tag & _IN_FLIGHT == _IN_FLIGHT:
                return fault(s, 8, lane, x)
            if _unordered(tag, thread, epoch, warp_epoch):
                return fault(s, 6 if writes else 5, lane, x)
        elif not writes and word(s.settings, UNINITIALISED):
            return fault(s, 9, lane, x)
        readers = word(s.shared_reader, i)
        if not writes:
            put(s.shared_reader, i, _read_tag(readers, thread, epoch, warp_epoch))
        elif _read_before(readers, thread, epoch, warp_epoch):
            return fault(s, 7, lane, x)
    if writes:
        tag = epoch << _EPOCH | warp_epoch << 12 | thread
        for i in range(begin, end):
            put(s.shared_writer, i, tag)
    elif not others:
        tag = word(s.shared_reader, begin)
        for i in range(begin, end):
            put(s.shared_reader, i, tag)
    return 0


@inside
def _access_shared(s, r, m, ins, slot, warp, writes):
    size, count = word(ins, SIZE), word(ins, VEC)
    total = size * count
    base = np.uint64(s.shared) + np.uint64(slot * word(s.settings, SHARED_SIZE))
    for lane in range(32):
        if bits(m, lane):
            x = bits(s.masks, 64 + lane) & _IN_WINDOW
            if x & np.uint64(total - 1):
                return fault(s, 3, lane, x)
            wrong = check_shared(s, slot, warp, lane, x, total, writes)
            if wrong:
                return wrong
            for i in range(count):
                row = word(ins, D0 + i) * 32 + lane
                if writes:
                    store(base + x + np.uint64(i * size), size, bits(r, row))
                else:
                    put_bits(r, row, load(base + x + np.uint64(i * size), size))
    return 0


# ---- global memory -------------------------------------------------------------------------------


@inside
def _tag(s, slot, thread):
    return (word(s.block, slot) + 1) << 32 | (word(s.epoch, slot) & 0x3FFFFF) << 10 | thread


@inside
def _check_grain(s, slot, lane, thread, grain, x):
    """Whether what was last written there may be used by this thread: 0, or a fault."""
    tag, own = word(s.writer, grain), _tag(s, slot, thread)
    if tag == 0:
        return 0
    if tag >> 32 == own >> 32:
        if tag & 1023 != thread and (tag ^ own) >> 10 == 0:
            return fault(s, 10, lane, x)
        return 0
    when = word(s.released, grain)
    if when == 0:
        return fault(s, 11, lane, x)
    if when > word(s.acquired, slot * word(s.settings, THREADS) + thread):
        return fault(s, 12, lane, x)
    return 0


@inside
def check_global(s, slot, warp, lane, x, total, which, writes):
    """The grains of one lane's access."""
    at = which * RANGE_FIELDS
    if not word(s.settings, RACES) or not (writes or word(s.ranges, at + 4)):
        return 0
    shift = bits(s.ranges, at + 2)
    if shift == np.uint64(63):  # too large to be looked after
        return 0
    thread, first = warp * 32 + lane, word(s.ranges, at + 3)
    begin = bits(s.ranges, at)
    low = first + np.int64((x - begin) >> shift)
    high = first + np.int64((x - begin + np.uint64(total - 1)) >> shift)
    written = 0
    for grain in range(low, high + 1):
        written |= word(s.writer, grain)
    if written:
        for grain in range(low, high + 1):
            wrong = _check_grain(s, slot, lane, thread, grain, x)
            if wrong:
                return wrong
    if writes:
        put(s.ranges, at + 4, 1)
        tag = _tag(s, slot, thread)
        for grain in range(low, high + 1):
            put(s.writer, grain, tag)
        for grain in range(low, high + 1):
            put(s.released, grain, 0)
        if word(s.settings, FENCES):
            for grain in range(low, high + 1):
                n = word(s.pendings, slot)
                if n == PENDINGS:
                    return fault(s, 20, lane, x)
                entry = (slot * PENDINGS + n) * PENDING_FIELDS
                put(s.pending, entry, grain)
                put(s.pending, entry + 1, thread)
                put(s.pending, entry + 2, word(s.epoch, slot))
                put(s.pending, entry + 3, -1)
                put(s.pendings, slot, n + 1)
    return 0


@inside
def count(s, m, which, total, writes, slot):
    """Of one access of a warp: lanes, bytes, sectors, and those that are new to the block."""
    at = (writes * word(s.settings, RANGES) + which) * FIGURES
    base = writes * word(s.settings, SECTORS) + word(s.ranges, which * RANGE_FIELDS + 5)
    begin = bits(s.ranges, which * RANGE_FIELDS) >> _SECTOR
    lanes = sectors = fresh = 0
    for lane in range(32):
        if bits(m, lane):
            lanes += 1
            sector = bits(s.masks, 64 + lane) >> _SECTOR
            known = False
            for other in range(sectors):
                known = known or bits(s.masks, 96 + sectors - 1 - other) == sector
                if known:
                    break
            if not known:
                put_bits(s.masks, 96 + sectors, sector)
                sectors += 1
                cell = base + np.int64(sector - begin)
                if word(s.sectors, cell) != word(s.block, slot) + 1:
                    put(s.sectors, cell, word(s.block, slot) + 1)
                    fresh += 1
    put(s.traffic, at, word(s.traffic, at) + 1)
    put(s.traffic, at + 1, word(s.traffic, at + 1) + lanes)
    put(s.traffic, at + 2, word(s.traffic, at + 2) + lanes * total)
    put(s.traffic, at + 3, word(s.traffic, at + 3) + sectors)
    put(s.traffic, at + 4, word(s.traffic, at + 4) + fresh)


@inside
def _found_range(s, m, first, last, crooked, total):
    """The range in which all lanes' addresses lie; -1 with a fault, -2 if there are several."""
    if crooked:
        _fault_of_lane(s, m, 1, total, True)
        return -1
    which = range_of(s, first, last + np.uint64(total))
    if which >= 0:
        return which
    if _fault_of_lane(s, m, 2, total, False):
        return -1
    return -2


@inside
def access(s, r, m, ins, slot, warp, writes):
    """A load or a store."""
    size, parts, space = word(ins, SIZE), word(ins, VEC), word(ins, SPACE) & 3
    total = size * parts
    first, last, crooked = _addresses(s, r, m, word(ins, A) * 32, word(ins, J), total)
    if last < first:
        return 0
    if space == GENERIC and last >= _WINDOW:
        if first < _WINDOW:
            return fault(s, 22, 0, last)
        space = SHARED
    if space == SHARED:
        return _access_shared(s, r, m, ins, slot, warp, writes)
    which = _found_range(s, m, first, last, crooked, total)
    if which == -1:
        return word(s.fault, 0)
    if word(s.settings, COUNTING):
        if which < 0:
            return fault(s, 24, 0, first)
        count(s, m, which, total, writes, slot)
    ordered = word(ins, SPACE) & (RELAXED | ACQUIRE | RELEASE)
    if ordered:
        for lane in range(32):
            if bits(m, lane):
                before(s, slot, warp, lane, word(ins, SPACE))
    else:
        for lane in range(32):
            if bits(m, lane):
                x = bits(s.masks, 64 + lane)
                own = which if which >= 0 else range_of(s, x, x + np.uint64(total))
                wrong = check_global(s, slot, warp, lane, x, total, own, writes)
                if wrong:
                    return wrong
    for i in range(parts):
        row, more = word(ins, D0 + i) * 32, np.uint64(i * size)
        for lane in range(32):
            if bits(m, lane):
                x = bits(s.masks, 64 + lane) + more
                if writes:
                    store(x, size, bits(r, row + lane))
                else:
                    put_bits(r, row + lane, load(x, size))
    if ordered:
        for lane in range(32):
            if bits(m, lane):
                after(s, slot, warp, lane, word(ins, SPACE))
    return 0


# ---- order between blocks ------------------------------------------------------------------------


@inside
def fence(s, slot, thread):
    """What the thread knows of comes before, and what it saw of others before what it does next."""
    n, epoch = word(s.pendings, slot), word(s.epoch, slot)
    for i in range(n):
        entry = (slot * PENDINGS + i) * PENDING_FIELDS
        known = word(s.pending, entry + 1) == thread or word(s.pending, entry + 2) < epoch
        if known and word(s.pending, entry + 3) < 0:
            put(s.pending, entry + 3, thread)
            put(s.pending, entry + 4, epoch)
    at = slot * word(s.settings, THREADS) + thread
    put(s.acquired, at, word(s.seen, at))


@inside
def tell_and_see(s, slot, thread):
    """An atomic or the like: others can know now what was fenced, and this thread knows them."""
    now = word(s.totals, CLOCK) + 1
    put(s.totals, CLOCK, now)
    n, kept, epoch = word(s.pendings, slot), 0, word(s.epoch, slot)
    for i in range(n):
        entry = (slot * PENDINGS + i) * PENDING_FIELDS
        by = word(s.pending, entry + 3)
        if by >= 0 and (by == thread or word(s.pending, entry + 4) < epoch):
            put(s.released, word(s.pending, entry), now)
            continue
        to = (slot * PENDINGS + kept) * PENDING_FIELDS
        for j in range(PENDING_FIELDS):
            put(s.pending, to + j, word(s.pending, entry + j))
        kept += 1
    put(s.pendings, slot, kept)
    put(s.seen, slot * word(s.settings, THREADS) + thread, now)


@inside
def before(s, slot, warp, lane, space):
    if space & RELEASE:
        fence(s, slot, warp * 32 + lane)
    tell_and_see(s, slot, warp * 32 + lane)


@inside
def after(s, slot, warp, lane, space):
    if space & ACQUIRE:
        fence(s, slot, warp * 32 + lane)


@inside
def join(s, slot):
    """A barrier: all threads of the block know what any of them knew."""
    threads = word(s.settings, THREADS)
    seen = acquired = 0
    for i in range(slot * threads, (slot + 1) * threads):
        seen, acquired = max(seen, word(s.seen, i)), max(acquired, word(s.acquired, i))
    for i in range(slot * threads, (slot + 1) * threads):
        put(s.seen, i, seen)
        put(s.acquired, i, acquired)


@inside
def _changed(how, old, b, c, k, of_signed):
    if how == ADD:
        return (old + b) & k
    if how == INC:
        return ZERO if old >= b else old + ONE
    if how == DEC:
        return b if old == ZERO or old > b else old - ONE
    if how == EXCH:
        return b
    if how == CAS:
        return c if old == b else old
    if how == AND:
        return old & b
    if how == OR:
        return old | b
    if how == XOR:
        return old ^ b
    less = signed(b, k) < signed(old, k) if of_signed else b < old
    return b if less == (how == MIN) else old


@inside
def atomic(s, r, m, ins, slot, warp):
    """Lane by lane. Of shared memory, too: it is checked as a write."""
    size, space = word(ins, SIZE), word(ins, SPACE) & 3
    k = LOW32 if size == 4 else ALL
    first, last, crooked = _addresses(s, r, m, word(ins, A) * 32, word(ins, J), size)
    if last < first:
        return 0
    if space == SHARED or (space == GENERIC and last >= _WINDOW):
        return fault(s, 23, 0, last)
    which = _found_range(s, m, first, last, crooked, size)
    if which == -1:
        return word(s.fault, 0)
    if word(s.settings, COUNTING) and which >= 0:
        count(s, m, which, size, 0, slot)
        count(s, m, which, size, 1, slot)
    for lane in range(32):
        if bits(m, lane):
            x = bits(s.masks, 64 + lane)
            before(s, slot, warp, lane, word(ins, SPACE))
            old = load(x, size)
            b, c = bits(r, word(ins, B) * 32 + lane), bits(r, word(ins, C) * 32 + lane)
            store(x, size, _changed(word(ins, K), old, b, c, k, word(ins, E)))
            if word(ins, D0) >= 0:
                put_bits(r, word(ins, D0) * 32 + lane, old)
            after(s, slot, warp, lane, word(ins, SPACE))
    return 0


# ---- asynchronous copies -------------------------------------------------------------------------


@inside
def copy(s, r, m, ins, slot, warp):
    """From global to shared memory. Nobody may use the bytes until the thread waited for them."""
    size = word(ins, SIZE)
    first, last, crooked = _addresses(s, r, m, word(ins, B) * 32, word(ins, K), size)
    if last < first:
        return 0
    if crooked:
        return _fault_of_lane(s, m, 1, size, True)
    shared = word(s.settings, SHARED_SIZE)
    for lane in range(32):
        if bits(m, lane):
            thread, x = warp * 32 + lane, bits(s.masks, 64 + lane)
            given = min(size, np.int64(bits(r, word(ins, C) * 32 + lane)))
            # An address of nothing has to be valid, too.
            which = range_of(s, x, x + np.uint64(max(given, 1)))
            if which < 0:
                return fault(s, 2, lane, x)
            if given:
                wrong = check_global(s, slot, warp, lane, x, given, which, 0)
                if wrong:
                    return wrong
            to = (bits(r, word(ins, A) * 32 + lane) + np.uint64(word(ins, J))) & _IN_WINDOW
            if to & np.uint64(size - 1):
                return fault(s, 3, lane, to)
            wrong = check_shared(s, slot, warp, lane, to, size, 1)
            if wrong:
                return wrong
            n = word(s.copying, slot)
            if n == COPIES:
                return fault(s, 21, lane, to)
            begin = slot * shared + np.int64(to)
            base = np.uint64(s.shared) + np.uint64(begin)
            for i in range(size):
                value = load(x + np.uint64(i), 1) if i < given else ZERO
                store(base + np.uint64(i), 1, value)
                put(s.shared_writer, begin + i, word(s.shared_writer, begin + i) | _IN_FLIGHT)
            entry = (slot * COPIES + n) * COPY_FIELDS
            put(s.copies, entry, thread)
            put(s.copies, entry + 1, word(s.group, slot * word(s.settings, THREADS) + thread))
            put(s.copies, entry + 2, begin)
            put(s.copies, entry + 3, size)
            put(s.copying, slot, n + 1)
    if word(s.settings, COUNTING):
        which, reads = -1, s.masks + 128 * 8
        for lane in range(32):
            given = bits(m, lane) != ZERO and bits(r, word(ins, C) * 32 + lane) != ZERO
            put_bits(reads, lane, ALL if given else ZERO)
            if given:
                x = bits(s.masks, 64 + lane)
                which = range_of(s, x, x + ONE)
        if which >= 0:
            count(s, reads, which, size, 0, slot)
    return 0


@inside
def commit(s, m, slot, warp):
    for lane in range(32):
        if bits(m, lane):
            at = slot * word(s.settings, THREADS) + warp * 32 + lane
            put(s.group, at, word(s.group, at) + 1)


@inside
def wait(s, m, ins, slot, warp):
    """For all groups of the lanes but the last J; K: for what is in no group, too."""
    n, kept = word(s.copying, slot), 0
    warp_epoch = word(s.warp_epoch, slot * word(s.settings, WARPS) + warp) & 0xFFFFF
    for i in range(n):
        entry = (slot * COPIES + i) * COPY_FIELDS
        thread, group = word(s.copies, entry), word(s.copies, entry + 1)
        current = word(s.group, slot * word(s.settings, THREADS) + thread)
        arrived = word(ins, K) != 0 or group < current - word(ins, J)
        if arrived and thread >> 5 == warp and bits(m, thread & 31):
            tag = word(s.epoch, slot) << _EPOCH | warp_epoch << 12 | thread
            begin = word(s.copies, entry + 2)
            for j in range(begin, begin + word(s.copies, entry + 3)):
                put(s.shared_writer, j, tag)
            continue
        to = (slot * COPIES + kept) * COPY_FIELDS
        for j in range(COPY_FIELDS):
            put(s.copies, to + j, word(s.copies, entry + j))
        kept += 1
    put(s.copying, slot, kept)
