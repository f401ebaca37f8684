"""What the machine knows of a launch, as Numba sees it: addresses of arrays of 64-bit words.

Arrays themselves would have their references counted at each use, and the sign of each index
looked at. Python makes the arrays and keeps them alive (``launch.py``).
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(64)


def _reader(kind):
    def typer(context, base, i):
        def code(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return kind(types.int64, types.int64), code

    return intrinsic(typer)


def _writer(kind):
    def typer(context, base, i, value):
        def code(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, kind), code

    return intrinsic(typer)


word, bits = _reader(types.int64), _reader(types.uint64)
put, put_bits = _writer(types.int64), _writer(types.uint64)


class Words(NamedTuple):
    """Addresses. A slot holds one of the blocks that are resident together."""

    code: int  # [instruction][field]
    registers: int  # [slot][warp][row][32]
    pc: int  # [slot][thread]
    status: int  # [slot][thread]
    block: int  # [slot], the number of a block, or -1
    epoch: int  # [slot], barriers passed, of all its blocks so far
    born: int  # [slot], the epoch in which its block began
    warp_epoch: int  # [slot][warp], warp barriers passed
    order: int  # numbers of the blocks that run
    settings: int
    totals: int
    masks: int  # scratch, [32] each: two masks, the lanes' addresses, sectors, a mask of copies
    fault: int  # what was wrong, where
    shared: int  # [slot], bytes
    shared_writer: int  # [slot][byte], tags
    shared_reader: int  # [slot][byte], tags
    ranges: int  # [range]: begin, end, log2 of a grain's bytes, its first grain, written
    writer: int  # [grain], tags
    released: int  # [grain], when others could know of the value
    pending: int  # [slot][i]: grain, thread, epoch, fencing thread or -1, epoch of the fence
    pendings: int  # [slot], how many
    seen: int  # [slot][thread], when it last looked at what others tell
    acquired: int  # [slot][thread], the part of it behind a fence
    copies: int  # [slot][i]: thread, group, shared address, bytes
    copying: int  # [slot], how many
    group: int  # [slot][thread], the one that its copies now join
    traffic: int  # [load or store][range][figure]
    sectors: int  # [load or store][sector], the last block that touched it


SETTINGS = (
    "slots", "warps", "threads", "rows", "shared_size", "blocks", "quantum", "shuffle", "split",
    "races", "fences", "uninitialised", "counting", "ranges", "grid_x", "grid_y", "row_x",
    "row_y", "row_z", "sectors",
)  # fmt: skip
(SLOTS, WARPS, THREADS, ROWS, SHARED_SIZE, BLOCKS, QUANTUM, SHUFFLE, SPLIT, RACES, FENCES,
 UNINITIALISED, COUNTING, RANGES, GRID_X, GRID_Y, ROW_X, ROW_Y, ROW_Z, SECTORS) = range(
    len(SETTINGS)
)  # fmt: skip
INSTRUCTIONS, LANES, NEXT, LIVE, CLOCK, RANDOM = range(6)
RANGE_FIELDS, PENDING_FIELDS, COPY_FIELDS, FIGURES = 6, 5, 4, 5
PENDINGS = COPIES = 1 << 14

FAULTS = {
    1: "a misaligned access",
    2: "an access out of bounds",
    3: "a misaligned access to shared memory",
    4: "an access to shared memory out of bounds",
    5: "a race in shared memory: it reads what another thread wrote, without a barrier between",
    6: "a race in shared memory: it writes what another thread wrote, without a barrier between",
    7: "a race in shared memory: it writes what another thread reads, without a barrier between",
    8: "it uses shared memory that a cp.async still writes",
    9: "it reads shared memory that nobody wrote",
    10: "a race: it uses what a thread of this block wrote, without a barrier between",
    11: "it uses what another block wrote, without a fence, an atomic or the like of that block"
        " behind it",
    12: "it uses what another block wrote, without an atomic or the like and a fence of its own"
        " between",
    13: "a divergent barrier: threads of this block wait at different ones",
    14: "a barrier that threads wait at which others will not reach: they have exited",
    15: "a warp operation whose mask lacks the lane itself",
    16: "a warp operation waits for lanes of its mask which do not come to it",
    17: "a shuffle reads a lane that is not in its mask",
    18: "its mask names lanes that the block has not",
    19: "lanes give different masks to one warp operation",
    20: "more unfenced stores of one block than the machine keeps",
    21: "more copies on their way than the machine keeps",
    22: "lanes of one access use shared and global memory",
    23: "an instruction without a meaning",
    24: "an access of one warp to several arrays",
}  # fmt: skip
