"""``python -m cupybn compile``: compiles what the first forward and backward would.

The result stays on disk, beside the library or in ``NUMBA_CACHE_DIR``, for this machine's kind of
processor. One run before a job saves each of its ranks the first seconds.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from typing import Any

from ..arrays import DATA_TYPES, dtype_named
from ..backends import cpu as backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DATA_TYPES, help="of the data; all")
    parser.add_argument("--masks", action="store_true", help="also what a mask needs")


def run(args: argparse.Namespace) -> int:
    try:
        kernels = backend.load()
    except ImportError as error:
        print(f"Numba cannot be used ({error}): pip install --upgrade numba")
        return 1
    names = list(args.dtypes or DATA_TYPES)
    if "bfloat16" in names and find_spec("ml_dtypes") is None:
        print("bfloat16 needs ml_dtypes: pip install ml_dtypes")
        names.remove("bfloat16")
    kernels.announced.update(names)  # the bar says it
    masks = (False, True) if args.masks else (False,)
    work = list(product(names, (False, True), backend.DIRECTIONS, masks))
    bar: Any = None
    if find_spec("tqdm") is not None:
        bar = import_module("tqdm").tqdm(total=len(work), unit="call")
    total = 0
    for name, columns, direction, masked in work:
        what = f"{name} {'columns' if columns else 'rows'} {direction}{' masked' * masked}"
        if bar is not None:
            bar.set_description(what)
        dtype = dtype_named(name, "it")
        compiled, seconds = backend.rehearse(direction, dtype, columns, masked=masked)
        total += compiled
        if bar is None:
            print(f"{what}: {compiled} compiled in {seconds:.1f} s")
        else:
            bar.update()
    if bar is not None:
        bar.close()
    print(f"compiled: {total} kernels, kept in {kernels.folder() or 'no folder'}")
    return 0
