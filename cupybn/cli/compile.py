"""``python -m cupybn compile``: what Numba would compile at the first forward and backward.

The result is kept on disk beside the library, or where ``NUMBA_CACHE_DIR`` says, for this machine's
kind of processor. One run before a job saves each of its ranks the first seconds.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from ..backends import cpu as backend

_DTYPES = ("float32", "float64", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, help="of the data; all")


def run(args: argparse.Namespace) -> int:
    try:
        backend.load()
    except ImportError as error:
        print(f"Numba cannot be used ({error}): pip install 'cupybn[cpu]'")
        return 1
    for name in args.dtypes or _DTYPES:
        if name == "bfloat16" and find_spec("ml_dtypes") is None:
            print("bfloat16 needs ml_dtypes: pip install 'cupybn[bfloat16]'")
            continue
        dtype = np.dtype(import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)
        for columns in (False, True):
            for direction in backend.DIRECTIONS:
                compiled, seconds = backend.rehearse(direction, dtype, columns)
                layout = "columns" if columns else "rows"
                print(f"{name:9}{layout:8}{direction:15}{compiled:3} compiled {seconds:6.1f} s")
    return 0
