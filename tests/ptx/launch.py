"""Modules, kernels and launches as CuPy has them, on NumPy arrays, run by the machine.

module = compile_module(text, ["scale"])
module.get_function("scale")((blocks,), (256,), (y, x, np.int64(n)))
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import nvrtc, words
from .memory import NOBODYS
from .program import GAP, Program, read

_GRID = (2**31 - 1, 65535, 65535)
_BLOCK = (1024, 1024, 64)
_STATIC = 48 << 10
_TURNS = 1 << 22  # instructions of warps between two looks at the clock and at other launches
_LARGE = 1 << 29  # bytes of an array whose writers are not noted
_lock = threading.Lock()
_STARTED = itertools.count(int(os.environ.get("CUPYBN_PTX_SEED", "0")))


@cache
def missing() -> str | None:
    """Why nothing can run here; None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "no Numba, which compiles the machine: pip install numba"
    return nvrtc.missing()


class PtxError(RuntimeError):
    """What a GPU would answer with a hang, garbage, or an error at the next synchronisation."""


@dataclass(frozen=True)
class Settings:
    """How launches run.

    Attributes:
        resident: blocks that are there together.
        quantum: instructions that a warp does at most before another may.
        shuffle: warps and blocks take turns in random order; else one after the other.
        split: lanes of a warp, too, as the hardware may.
        races: shared and global memory are watched for use without a barrier or fence.
        uninitialised: reading shared memory that nobody wrote is a fault.
        counting: traffic is counted; one block at a time, in order.
        blocks: which of so many run; None: all.
        limit: instructions of warps, after which a launch counts as hung.
        seed: of the random order; None: that of the process and the number of the launch.
    """

    resident: int = 4
    quantum: int = 400
    shuffle: bool = True
    split: bool = False
    races: bool = True
    uninitialised: bool = True
    counting: bool = False
    blocks: Callable[[int], Sequence[int]] | None = None
    limit: int = 1 << 34
    seed: int | None = None


settings = Settings()
totals: Counter[str] = Counter()  # instructions, lanes, launches of this process
ran: Counter[tuple[str, int]] = Counter()  # launches of a kernel of a module, by name and its text


@contextlib.contextmanager
def setting(**changes: Any) -> Iterator[None]:
    """Other settings for the launches in it, of all threads."""
    global settings
    before, settings = settings, replace(settings, **changes)
    try:
        yield
    finally:
        settings = before


class Access(NamedTuple):
    """Loads or stores of one array.

    `instructions` counts those of warps; `sectors` the 32-byte sectors of each, added up;
    `block_sectors` the different ones of each block, added up.
    """

    instructions: int
    lanes: int
    bytes: int
    sectors: int
    block_sectors: int


class Counted(NamedTuple):
    """The traffic of a launch: (address, bytes) of each array in it, its loads, its stores."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    memory: list[tuple[int, int]]
    loads: list[Access]
    stores: list[Access]


_counted: list[Counted] | None = None


@contextlib.contextmanager
def counting() -> Iterator[list[Counted]]:
    """Counts the traffic of the launches in it."""
    global _counted
    _counted, outer = [], _counted
    try:
        with setting(counting=True, resident=1, shuffle=False):
            yield _counted
    finally:
        _counted = outer


class Kernel:
    """Called like a CuPy RawKernel."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, program: Program, text: str = "") -> None:
        self.name, self.program = program.name, program
        self._text = hash(text)

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0
    ) -> None:
        run(self.start(grid, block, args, shared_mem=shared_mem))

    def start(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0
    ) -> Launch:
        """The launch, before anything has run."""
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise PtxError(
                f"{shared_mem} bytes of dynamic shared memory: set max_dynamic_shared_size_bytes"
            )
        ran[self.name, self._text] += 1
        return Launch(self.program, grid, block, args, shared_mem, settings)


class Module:
    def __init__(self, ptx: str, text: str = "") -> None:
        self.ptx = ptx
        self._kernels = {name: Kernel(program, text) for name, program in read(ptx).items()}

    def get_function(self, name: str) -> Kernel:
        return self._kernels[name]


@cache
def _module(text: str, architecture: str) -> Module:
    return Module(nvrtc.compile_text(text, architecture), text)


def compile_module(text: str, kernels: Sequence[str] = (), architecture: str = "") -> Module:
    """In the place of the function of this name in cupybn/backends/cuda/source.py."""
    return _module(text, architecture or nvrtc.ARCHITECTURE)


def run(*launches: Launch) -> None:
    """To their ends; several take turns, as launches on several streams may."""
    left = list(launches)
    turn = _TURNS if len(left) == 1 else 500
    while left:
        left = [launch for launch in left if not launch.advance(turn)]


def _three(dims: Sequence[int], limits: Sequence[int], what: str) -> tuple[int, int, int]:
    x, y, z = (*map(int, dims), 1, 1)[:3]
    if len(dims) > 3 or any(not 1 <= d <= top for d, top in zip((x, y, z), limits, strict=True)):
        raise PtxError(f"invalid configuration argument: {what} {tuple(dims)}")
    return x, y, z


def _scalar(value: Any) -> np.generic[Any]:
    """As CuPy takes Python's own numbers."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value


def _size(kind: str) -> int:
    return int(kind.lstrip("busf")) // 8


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _ranges(arrays: Sequence[np.ndarray[Any, Any]]) -> list[tuple[int, int, int]]:
    """(begin, end, bytes of the smallest element), of arrays that overlap one for all."""
    found: list[tuple[int, int, int]] = []
    pieces = []
    for array in arrays:
        begin, end = np.lib.array_utils.byte_bounds(array)
        if end > begin:
            pieces.append((begin, end, array.itemsize))
    for begin, end, size in sorted(pieces):
        if found and begin < found[-1][1]:
            last = found[-1]
            found[-1] = last[0], max(last[1], end), min(last[2], size)
        else:
            found.append((begin, end, size))
    return found


class Launch:
    """One launch: all its state, in arrays of words."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_mem: int,
        how: Settings,
    ) -> None:
        self.program, self.how = program, how
        self.grid, self.block = _three(grid, _GRID, "grid"), _three(block, _BLOCK, "block")
        threads = int(np.prod(self.block))
        if threads > program.limit:
            raise PtxError(
                f"invalid configuration argument: block {tuple(block)} of {program.name}, which"
                f" takes {program.limit} threads"
            )
        if program.shared and sum(end - begin for begin, end in program.shared) > _STATIC:
            raise PtxError(f"{program.name} has more than 48 KB of static shared memory")
        self.args = args  # alive as long as the launch
        self._keep: dict[str, np.ndarray[Any, Any]] = {}
        self._set = dict.fromkeys(words.SETTINGS, 0)
        total = int(np.prod(self.grid))
        chosen = range(total) if how.blocks is None else how.blocks(total)
        slots = max(1, min(how.resident, len(chosen)))
        self._set |= {
            "slots": slots,
            "warps": -(-threads // 32),
            "threads": threads,
            "rows": program.rows + len(program.constants),
            "blocks": len(chosen),
            "quantum": how.quantum,
            "shuffle": int(how.shuffle),
            "split": int(how.split),
            "races": int(how.races),
            "uninitialised": int(how.uninitialised),
            "counting": int(how.counting),
            "grid_x": self.grid[0],
            "grid_y": self.grid[1],
        }
        self._set["fences"] = int(program.tells)
        seed = next(_STARTED) if how.seed is None else how.seed
        order = np.asarray(chosen, np.int64)
        if how.shuffle:
            order = np.random.default_rng(seed).permutation(order)
        self._words("order", order)
        self._words("code", program.code)
        self._lay_out_shared(shared_mem)
        self._registers(args)
        self._slots()
        self._memory(args)
        self._words("settings", np.array([self._set[name] for name in words.SETTINGS]))
        totals = self._words("totals", 8)
        totals[words.RANDOM] = 0x9E3779B97F4A7C15 - (1 << 64) + 2 * seed
        self._words("fault", 8)
        self._words("masks", 160)
        addresses = {name: _address(array) for name, array in self._keep.items()}
        self._state = words.Words(**{name: addresses.get(name, 0) for name in words.Words._fields})

    def _words(self, name: str, what: Any, fill: int = 0) -> np.ndarray[Any, Any]:
        """An array of so many words, or with these values."""
        if isinstance(what, int):
            array = np.full(what, fill, np.int64) if fill else np.zeros(what, np.int64)
        else:
            array = np.ascontiguousarray(what, np.int64)
        self._keep[name] = array
        return array

    def _lay_out_shared(self, dynamic: int) -> None:
        variables = list(self.program.shared)
        self._dynamic = -(-(variables[-1][1] + 1 if variables else 0) // GAP) * GAP
        if dynamic:
            variables.append((self._dynamic, self._dynamic + dynamic))
        size = -(-(variables[-1][1] if variables else 0) // 8) * 8
        slots = self._set["slots"]
        self._set["shared_size"] = size
        self._words("shared", slots * size // 8)
        tags = self._words("shared_writer", slots * size, NOBODYS).reshape(slots, size)
        for begin, end in variables:
            tags[:, begin:end] = 0
        self._words("shared_reader", slots * size)

    def _registers(self, args: Sequence[Any]) -> None:
        program, slots, warps = self.program, self._set["slots"], self._set["warps"]
        if len(args) != len(program.parameters):
            raise TypeError(
                f"{program.name} takes {len(program.parameters)} arguments, got {len(args)}"
            )
        given = [self._parameter(i, value) for i, value in enumerate(args)]
        rows = np.empty((slots, warps, self._set["rows"], 32), np.uint64)
        thread = np.arange(warps * 32, dtype=np.uint64).reshape(warps, 32)
        bx, by, _ = self.block
        special = {
            "laneid": thread % 32,
            "warpid": thread // 32,
            "nwarpid": warps,
            "tid.x": thread % bx,
            "tid.y": thread // bx % by,
            "tid.z": thread // (bx * by),
            "ctaid.x": 0,
            "ctaid.y": 0,
            "ctaid.z": 0,
        }
        for axis, count, block in zip("xyz", self.grid, self.block, strict=True):
            special |= {f"nctaid.{axis}": count, f"ntid.{axis}": block}
        for axis in "xyz":
            self._set[f"row_{axis}"] = -1
        rows[:, :, program.rows :] = program.numbers
        for row, (what, which) in program.of_launch:
            if what == "parameter":
                rows[:, :, row] = given[which]
            elif what == "dynamic":
                rows[:, :, row] = self._dynamic
            else:
                rows[:, :, row] = special[which]
                if which.startswith("ctaid"):
                    self._set[f"row_{which[-1]}"] = row
        self._keep["registers"] = rows

    def _parameter(self, i: int, value: Any) -> int:
        """The bits of an argument, which must have the size that the kernel takes."""
        if isinstance(value, np.ndarray):
            packed = np.array(_address(value), np.uint64)
        else:
            packed = np.array(_scalar(value))
        kind = self.program.parameters[i]
        if packed.dtype.itemsize != _size(kind):
            raise TypeError(
                f"{self.program.name}, argument {i}: {type(value).__name__} of"
                f" {packed.dtype.itemsize} bytes for one of {_size(kind)}"
            )
        return int(packed.view(f"u{packed.dtype.itemsize}"))

    def _slots(self) -> None:
        slots, threads = self._set["slots"], self._set["threads"]
        for name in ("pc", "status", "seen", "acquired", "group"):
            self._words(name, slots * threads)
        self._words("block", slots, -1)
        for name in ("epoch", "born", "pendings", "copying"):
            self._words(name, slots)
        self._words("warp_epoch", slots * self._set["warps"])
        fences, copies = self._set["fences"], self.program.copies
        self._words("pending", fences * slots * words.PENDINGS * words.PENDING_FIELDS)
        self._words("copies", copies * slots * words.COPIES * words.COPY_FIELDS)

    def _memory(self, args: Sequence[Any]) -> None:
        """The arrays of the launch; an access outside all of them is out of bounds."""
        self.ranges = _ranges([a for a in args if isinstance(a, np.ndarray)])
        table, grains, sectors = [], 0, 0
        watched = self.how.races
        for begin, end, size in self.ranges:
            shift = 63 if end - begin > _LARGE else size.bit_length() - 1
            table.append((begin, end, shift, grains, 0, sectors))
            if watched and shift < 63:
                grains += -(-(end - begin) // size)
            sectors += (end >> 5) - (begin >> 5) + 1
        self._set |= {"ranges": len(table), "sectors": sectors}
        self._words("ranges", np.array(table, np.int64).ravel())
        self._words("writer", grains)
        self._words("released", grains)
        counted = self._set["counting"]
        self._words("traffic", 2 * len(table) * words.FIGURES)
        self._words("sectors", counted * 2 * sectors)

    def advance(self, turns: int = _TURNS) -> bool:
        """Runs so many instructions; True at its end."""
        state = _machine()(self._state, min(turns, self.how.limit))
        done, lanes = (int(self._keep["totals"][i]) for i in (words.INSTRUCTIONS, words.LANES))
        if state < 0:
            raise PtxError(self._fault())
        if state == 0:
            with _lock:
                totals.update(instructions=done, lanes=lanes, launches=1)
            self._record()
        elif done > self.how.limit:
            raise PtxError(
                f"{self.program.name}: it did not end in {done} instructions of its warps"
            )
        return bool(state == 0)

    def _fault(self) -> str:
        kind, lane, value, pc, slot, warp = map(int, self._keep["fault"][:6])
        number = int(self._keep["block"][slot])
        x, y, _ = self.grid
        block = (number % x, number // x % y, number // (x * y))
        thread = warp * 32 + lane
        program, address = self.program, value % (1 << 64)
        return (
            f"{program.name}: {words.FAULTS[kind]}, block {block}, thread {thread}, at"
            f" {program.places[pc] or '?'}: {program.texts[pc]} ({address:#x})"
        )

    def _record(self) -> None:
        if not self.how.counting or _counted is None:
            return
        n = len(self.ranges)
        figures = self._keep["traffic"].reshape(2, n, words.FIGURES)
        loads, stores = ([Access(*map(int, row)) for row in half] for half in figures)
        memory = [(begin, end - begin) for begin, end, _ in self.ranges]
        _counted.append(Counted(self.program.name, self.grid, self.block, memory, loads, stores))


@cache
def _machine() -> Any:
    """Compiled, or read from disk; of processes that come at once, one compiles."""
    import fcntl

    from numba import int64, typeof

    from .machine import advance

    with open(nvrtc.kept() / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        advance.compile((typeof(words.Words(*[0] * len(words.Words._fields))), int64))
    return advance
