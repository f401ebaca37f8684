"""How long NVRTC takes for the first forward and backward of a process, nothing cached: no GPU.

    python tests/compile_time.py [--arch sm_90] [--repeat 3] [--mask]

Every kind of layer in processes of its own, one after the other; the fastest of `--repeat` is
printed, in seconds of the process (of the clock). Needs the extra "nvrtc".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from unittest.mock import patch

from kernel_cases import host_kernels, resident
from test_compile import compile_text

from cupybn import BatchNorm1d, BatchNorm2d
from cupybn.arrays import DATA_TYPES
from cupybn.backends import cuda

KINDS = {  # a shape, and whether one rank's passes are resident where they can
    "rows": ((4, 64, 28, 28), "0"),
    "ragged rows": ((4, 3, 101, 101), "0"),
    "columns": ((512, 64), "0"),
    "ragged runs": ((5, 3, 7, 7), "0"),
    "resident rows": ((4, 64, 28, 28), "1"),
    "resident columns": ((512, 64), "1"),
}


class _Nothing:
    def get_function(self, name):
        return lambda *launch, **options: None


def texts(dtype: str, shape: tuple[int, ...], setting: str, masked: bool) -> list[str]:
    """What a layer's first forward and backward compile, `masked` with a mask."""
    found: list[str] = []
    if dtype == "bfloat16":
        from ml_dtypes import bfloat16 as dtype
    cls = BatchNorm2d if len(shape) == 4 else BatchNorm1d
    build = lambda text, kernels: found.append(text) or _Nothing()  # noqa: E731
    with host_kernels(build) as cupy, resident(setting):
        layer = cls(shape[1], dtype="float64" if dtype == "float64" else None, device="cuda")
        count = cuda.count_valid  # which counts nothing where kernels do nothing
        with patch.object(cuda, "count_valid", lambda mask: count(mask) or mask.size):
            mask = {"mask": cupy.ones((shape[0], *shape[2:]), bool)} if masked else {}
            layer.backward(layer(cupy.ones(shape, dtype), **mask))
    return found


def measure(dtype: str, kind: str, arch: str, masked: bool) -> tuple[float, float, int]:
    modules = texts(dtype, *KINDS[kind], masked)
    began, clock = time.process_time(), time.perf_counter()
    for text in modules:
        compile_text(text, arch)
    return time.process_time() - began, time.perf_counter() - clock, len(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mask", action="store_true", help="of layers with a mask")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(*measure(*args.one, args.arch, args.mask))
        return
    print(f"| type | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for dtype in DATA_TYPES:
        cells = []
        for kind in KINDS:
            command = [sys.executable, __file__, "--arch", args.arch, "--one", dtype, kind]
            command += ["--mask"] * args.mask
            runs = [
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                for _ in range(args.repeat)
            ]
            spent, wall, modules = min(runs, key=lambda run: float(run[0]))
            cells.append(f"{float(spent):.2f} ({float(wall):.2f}), {modules} modules")
        print(f"| {dtype} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
