"""What the compiler's output shows of the kernels: the order of their loads. No GPU needed."""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from operator import le
from typing import NamedTuple

import pytest
import test_compile
from cuda_tools import need
from cuda_variants import RESIDENT, Variant, variants
from test_compile import compile_text, disassemble

from benchmarks import model
from cupybn.arrays import DATA_TYPES
from cupybn.backends.cuda.plan import _BATCH, VECTOR_BYTES, plan_launch

pytestmark = pytest.mark.timeout(900)
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
REDUCTIONS = "batch_moments", "backward_reduce"


@pytest.fixture(autouse=True)
def _tools():
    need(test_compile._missing())
    need(None if test_compile._nvdisasm() else "no nvdisasm: pip install nvidia-cuda-nvdisasm")


def variant_of(dtype: str, kernel: str, rows: int) -> Variant:
    """The module with a kernel over vectors of 16 bytes that is not ragged."""
    wanted = {"ROWS": rows, "VECTOR": VECTOR_BYTES // ITEMSIZE[dtype], "RAGGED_VECTORS": 0}
    return next(
        v
        for v in variants(dtype)
        if kernel in v.kernels and wanted.items() <= dict(v.defines).items()
    )


@cache
def listing(text: str, kernel: str, arch: str = "sm_90") -> list[list[str]]:
    """The instructions of a kernel in blocks, between labels and branches."""
    cubin, _ = compile_text(text, arch)
    blocks: list[list[str]] = [[]]
    for line in disassemble(cubin)[kernel].splitlines():
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line)
        if found:
            blocks[-1].append(found[1])
        if re.match(r"\.L", line.strip()) or (found and re.search(r"\bBRA\b", found[1])):
            blocks.append([])
    return blocks


def places(block: list[str], pattern: str) -> list[int]:
    return [i for i, instruction in enumerate(block) if re.search(pattern, instruction)]


def adds_in_batches(blocks: list[list[str]]) -> bool:
    """Whether partial sums, past the first-level cache, are all loaded before one is added."""
    found = [block for block in blocks if places(block, r"LDG\.E\.128\.STRONG\.GPU")]
    if len(found) != 1:
        return False
    loads, additions = (places(found[0], p) for p in (r"LDG\.E\.128\.STRONG\.GPU", r"\bDADD\b"))
    return len(loads) == _BATCH and len(additions) >= 2 * _BATCH and loads[-1] < additions[0]


@pytest.mark.parametrize("dtype", sorted(DATA_TYPES))
@pytest.mark.parametrize(("kernel", "rows"), list(product(REDUCTIONS, (0, 1))))
def test_partial_sums_are_loaded_in_batches(dtype, kernel, rows):
    """A load that waits for the one before costs the last block of columns 100 us."""
    assert adds_in_batches(listing(variant_of(dtype, kernel, rows).source, kernel))


def test_partial_sums_that_wait_for_each_other_are_found():
    text = """extern "C" __global__ void one_by_one(double2* out, const double2* x, int n) {
        double2 sum{0, 0};
        #pragma unroll 4
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            double2 pair{0, 0};
            if (i < n) pair = __ldcg(x + i);
            sum.x += pair.x, sum.y += pair.y;
        }
        out[threadIdx.x] = sum;
    }
    """
    assert not adds_in_batches(listing(text, "one_by_one"))


WIDE = r"LDG\.E(\.\w+)*\.128\b(?!.*STRONG)"
ARITHMETIC = r"\b(HADD2\.F32|FADD|FFMA|F2FP)\b"
KERNELS = "batch_moments", "normalize", "backward_reduce", "backward_input"


def unrolled(kernel: str, rows: int, dtype: str) -> int:
    """Vectors of each tensor that a thread has on their way."""
    if kernel == "normalize" and not rows and ITEMSIZE[dtype] == 2:
        return 2
    return 2 if kernel.startswith("backward") else 4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kernel", "rows"), list(product(KERNELS, (0, 1))))
def test_vectors_of_all_tensors_are_loaded_before_one_is_used(dtype, kernel, rows):
    """Also loads of the residual; the first ones come before the wait for the channels' numbers."""
    blocks = listing(variant_of(dtype, kernel, rows).source, kernel)
    loading = [block for block in blocks if places(block, WIDE)]
    each = unrolled(kernel, rows, dtype)
    assert loading
    for block in loading:
        loads, used = places(block, WIDE), places(block, ARITHMETIC)
        assert len(loads) % each == 0
        assert not [i for i in used if i < loads[-1] and i > loads[0]]
    everything = [instruction for block in blocks for instruction in block]
    barrier = places(everything, r"\bBAR\.SYNC")[0]
    tensors = 1 if kernel == "batch_moments" else 2
    assert sum(i < barrier for i in places(everything, WIDE)) >= tensors * each


def resident(registers: int, shared: int) -> int:
    """Blocks of 256 threads on a multiprocessor of sm_90: by its registers and shared memory.

    A warp takes registers by 256, a block 1 KB of shared memory beside its own (CUDA C++
    Programming Guide, technical specifications).
    """
    by_registers = 65536 // (8 * -(-32 * registers // 256) * 256)
    return min(2048 // 256, by_registers, (228 << 10) // (shared + 1024))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_model_knows_what_a_multiprocessor_holds(dtype):
    itemsize, vector = ITEMSIZE[dtype], VECTOR_BYTES // ITEMSIZE[dtype]
    for (kernel, kind), blocks in model.RESIDENT.items():
        variant = variant_of(dtype, kernel, int(kind == "rows"))
        _, log = compile_text(test_compile.bundle([variant]), "sm_90", "--ptxas-options=-v")
        number = variant.kernels.index(kernel)
        report = test_compile._sections(log, r"Function properties for ")[number]
        registers, shared = (
            int(re.search(p, report)[1]) for p in (r"(\d+) reg", r"(\d+) bytes smem")
        )
        if kind == "runs" and kernel in REDUCTIONS:
            shape = (100_000, 64, 1)
            shared += plan_launch(shape, itemsize, VECTOR_BYTES, VECTOR_BYTES, 132).shared_bytes
        assert resident(registers, shared) == blocks[vector], (kernel, kind, registers, shared)


ACCESS = r"\b(LDG|STG)\.E(\.\w+)*\.128\b(?!.*STRONG)"
MULTIPLY_ADD = r"\b[FHD]FMA2?\b"
COMPARE = r"\bFSETP\b"


class Path(NamedTuple):
    """What a warp executes of a loop: vectors of 16 bytes a lane, and instructions."""

    loaded: int = 0
    stored: int = 0
    multiplied: int = 0
    compared: int = 0
    instructions: int = 0

    def then(self, instruction: str) -> Path:
        access = re.search(ACCESS, instruction)
        return Path(
            self.loaded + bool(access and access[1] == "LDG"),
            self.stored + bool(access and access[1] == "STG"),
            self.multiplied + bool(re.search(MULTIPLY_ADD, instruction)),
            self.compared + bool(re.search(COMPARE, instruction)),
            self.instructions + 1,
        )


@cache
def rounds(text: str, kernel: str, arch: str) -> list[Path]:
    """The shortest ways through the loop over vectors, for each number of accesses and products."""
    cubin, _ = compile_text(text, arch)
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in disassemble(cubin)[kernel].splitlines():
        if found := re.match(r"\s*(\.L\w+):", line):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(found[1])
    targets = {
        i: labels[found[1]]
        for i, instruction in enumerate(code)
        if (found := re.search(r"\bBRA\b.*?`\((\.L\w+)\)", instruction))
    }
    begin, end = next(
        (to, at)
        for at, to in targets.items()
        if to <= at and any(re.search(ACCESS, i) for i in code[to : at + 1])
    )
    ways: dict[int, dict[tuple[int, ...], Path]] = {begin: {(): Path()}}
    for i in range(begin, end + 1):
        follows = [i + 1]
        if i in targets and i < end:
            always = re.match(r"BRA(\.\w+)* `", code[i])
            follows = ([] if always else follows) + [targets[i]] * (targets[i] > i)
        for path in ways.get(i, {}).values():
            path = path.then(code[i])
            for j in follows:
                known = ways.setdefault(j, {})
                known[path[:-1]] = min(path, known.get(path[:-1], path))
    return list(ways[end + 1].values())


# Instructions of a warp for 512 bytes on sm_90, where an H200 has time for 100, a B200 for 72. Of a
# kernel, without and behind a ReLU: the most that there may be, of float16 and float32; then those
# of float16 and float32, rows and runs (columns). Backward computes its ReLU again: that is dearer
# than reading bits.
INSTRUCTIONS = {
    ("batch_moments", False): ((54, 38), (53, 49, 33, 29)),
    ("normalize", False): ((54, 29), (29, 29, 18, 17)),
    ("normalize", True): ((54, 29), (37, 37, 22, 21)),
    ("backward_reduce", False): ((39, 25), (33, 32, 22, 21)),
    ("backward_reduce", True): ((51, 31), (50, 50, 29, 29)),
    ("backward_input", False): ((39, 23), (31, 29, 18, 16)),
    ("backward_input", True): ((39, 23), (39, 37, 22, 20)),
    ("backward_input and dresidual", False): ((31, 19), (25, 24, 15, 14)),
    ("backward_input and dresidual", True): ((39, 23), (32, 30, 19, 18)),
}


@pytest.mark.parametrize(("what", "relu"), INSTRUCTIONS)
def test_instructions_of_a_warp_for_512_bytes(what, relu):
    """All vectors of a round loaded, used, and stored where they are."""
    kernel, both = what.split()[0], "dresidual" in what
    limits, expected = INSTRUCTIONS[what, relu]
    found = []
    for dtype, rows in product(("float16", "float32"), (1, 0)):
        each = unrolled(kernel, rows, dtype)
        elements = each * VECTOR_BYTES // ITEMSIZE[dtype]
        loads = each * (2 if kernel.startswith("backward") else 1)
        stores = each * (kernel in ("normalize", "backward_input")) * (1 + both)
        again = relu and kernel.startswith("backward")  # y is multiplied and added, then compared
        found.append(
            min(
                path.instructions
                for path in rounds(variant_of(dtype, kernel, rows).source, kernel, "sm_90")
                if path[:2] == (loads, stores)
                and path.multiplied >= elements * (1 + again)
                and path.compared >= elements * relu
            )
            / (loads + stores)
        )
    assert all(map(le, found, expected)), found
    assert any(count > limit - 2 for count, limit in zip(found, expected, strict=True))
    assert all(map(le, found, (limits[0], limits[0], limits[1], limits[1])))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kernel", "rows"), list(product(RESIDENT, (0, 1))))
def test_resident_tensors_pass_through_no_registers(dtype, kernel, rows):
    """They are copied past the first-level cache, 16 bytes each, and waited for by batches."""
    variant = variant_of(dtype, kernel, rows)
    tensors, batches = (1, 7) if kernel == "local_forward" else (2, 3)
    code = [line for block in listing(variant.source, kernel) for line in block]
    copies = places(code, r"\bLDGSTS\.E\.BYPASS(\.\w+)*\.128\b")
    assert len(copies) == 2 * 2 * tensors  # two vectors, of the first batches and of each later one
    assert places(code, rf"\bDEPBAR\.LE SB0, 0x{batches}\b")
    assert len(places(code, WIDE)) == (2 if kernel == "local_forward" else 0)  # of the residual
    old = [line for block in listing(variant.source, kernel, "sm_75") for line in block]
    assert not places(old, "LDGSTS|DEPBAR.LE SB0, 0x[37]")
    assert len(places(old, WIDE)) > len(places(code, WIDE))
