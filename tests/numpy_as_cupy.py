"""NumPy under CuPy's names, as far as the bench uses them: for trying its GPU sections without a
GPU. A NumPy array is no array of this module, so that the library takes it for what it is.
"""

from __future__ import annotations

import time
from types import MappingProxyType, SimpleNamespace

import numpy as np


class Hook:
    active = None

    def __enter__(self):
        Hook.active = self

    def __exit__(self, *_):
        Hook.active = None


class Device:
    id = 0
    compute_capability = "90"
    attributes = MappingProxyType({"L2CacheSize": 1 << 20, "MultiProcessorCount": 2})

    def synchronize(self):
        pass


class Stream:
    def record(self, event):
        event.at = time.perf_counter()
        return event


def make():
    """A module's worth of names; the pool's used bytes grow by 100 with every allocation."""
    pool = SimpleNamespace(bytes=0, free_all_blocks=lambda: None)
    pool.used_bytes = lambda: pool.bytes

    def empty(*args, **options):
        pool.bytes += 100
        if Hook.active is not None:
            Hook.active.malloc_postprocess(size=100)
        return np.empty(*args, **options)

    runtime = SimpleNamespace(
        getDeviceProperties=lambda _: {"name": b"a device that is none"},
        getDeviceCount=lambda: 1,
        memGetInfo=lambda: (1 << 33, 1 << 34),
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    )
    cuda = SimpleNamespace(
        Device=Device, Event=SimpleNamespace, runtime=runtime, is_available=lambda: True,
        get_current_stream=Stream, memory_hook=SimpleNamespace(MemoryHook=Hook),
        get_elapsed_time=lambda begin, end: (end.at - begin.at) * 1e3,
    )  # fmt: skip
    names = ("zeros", "ones", "asarray", "empty_like", "uint8", "uint16", "uint32", "int16",
             "int64", "float32")  # fmt: skip
    return SimpleNamespace(
        **{name: getattr(np, name) for name in names}, empty=empty, cuda=cuda, __version__="none",
        __name__="fake",
        ndarray=type("ndarray", (), {}), get_default_memory_pool=lambda: pool,
        RawKernel=lambda *_: lambda *_: None,
    )  # fmt: skip
