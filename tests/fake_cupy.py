"""CuPy's place for tests of transports: device memory that nobody but its own copies can touch.

Its pages are protected, so whoever reads a device pointer on the host, MPI for instance, dies of a
segmentation fault, as with a real one. Copies and kernels wait in their stream's queue until
somebody waits for an event behind them, the latest moment CUDA allows: a host that does not wait
reads what was there before. Freed pinned memory is overwritten at once.

``install()`` puts it into ``sys.modules``. No arithmetic of the library runs on it but ufuncs;
after ``be_numpy()`` all does: device memory is like any other then, and nothing is put off.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import types
from contextlib import contextmanager

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_NONE, _READ_WRITE = 0, 3
SIZE = 1 << 24

log = []  # what happened, in order: "get", "event wait", "pinned", ...
open_to_all = False  # True: as if MPI could follow device pointers
eager = False  # True: streams do not put anything off


class _Arena:
    def __init__(self):
        self.memory = mmap.mmap(-1, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.used = 0
        self.depth = 0
        self.protect(_NONE)

    def protect(self, how):
        arguments = ctypes.c_void_p(self.address), ctypes.c_size_t(SIZE), how
        assert _libc.mprotect(*arguments) == 0, ctypes.get_errno()

    def empty(self, shape, dtype):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=int)) * dtype.itemsize
        begin, self.used = self.used, self.used + -(-size // 64) * 64
        assert self.used <= SIZE
        return np.ndarray.__new__(ndarray, shape, dtype, self.memory, begin)


_arena = _Arena()


@contextmanager
def touching_memory():
    """The device at work: its memory can be read and written."""
    _arena.depth += 1
    _arena.protect(_READ_WRITE)
    try:
        yield
    finally:
        _arena.depth -= 1
        if not (_arena.depth or open_to_all):
            _arena.protect(_NONE)


def open_memory():
    """From now on as a CUDA-aware MPI sees it: device pointers can be followed."""
    global open_to_all
    open_to_all = True
    _arena.protect(_READ_WRITE)


def be_numpy():
    """From now on device arrays are NumPy arrays under another name."""
    global eager
    open_memory()
    eager = True


class Stream:
    ptr = 0

    def __init__(self):
        self.queue, self.done = [], 0

    def is_capturing(self):
        return False

    def launch(self, work):
        """Enqueues a kernel: a function without arguments."""
        self.queue.append(work)
        if eager:
            self.synchronize()

    def run_to(self, position):
        while self.done < position:
            self.done += 1
            with touching_memory():
                self.queue[self.done - 1]()

    def synchronize(self):
        self.run_to(len(self.queue))

    def wait_event(self, event):
        self.launch(event.finish)

    def __enter__(self):
        self.before, _current[0] = _current[0], self

    def __exit__(self, *error):
        _current[0] = self.before


_current = [Stream()]


class Event:
    def __init__(self, disable_timing=False):
        self.point = None

    def record(self, stream):
        self.point = stream, len(stream.queue)

    def finish(self):
        if self.point is not None:
            self.point[0].run_to(self.point[1])

    def synchronize(self):
        log.append("event wait")
        self.finish()


class Device:
    def __init__(self, device=0):
        self.id = device

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Pointer:
    def __init__(self, address):
        self.ptr = address

    def copy_to_host_async(self, mem, size, stream):
        log.append("to host")
        stream.launch(lambda: ctypes.memmove(mem, self.ptr, size))

    def copy_from_host_async(self, mem, size, stream):
        log.append("from host")
        stream.launch(lambda: ctypes.memmove(self.ptr, mem, size))


_pinned_pool = []


class _Pinned(np.ndarray):
    def __del__(self):
        if self.base is not None and self.base.base is None:
            self.base[...] = 0xAB  # others have it now


def alloc_pinned_memory(size):
    log.append("pinned")
    _pinned_pool.append(np.zeros(size, np.uint8))
    return _pinned_pool[-1].view(_Pinned)


def is_pinned(array):
    """Whether a host array lies in pinned memory."""
    address = array.__array_interface__["data"][0]
    begins = ((block.__array_interface__["data"][0], block.nbytes) for block in _pinned_pool)
    return any(begin <= address < begin + size for begin, size in begins)


class ndarray(np.ndarray):  # CuPy's name
    device = Device()

    @property
    def data(self):
        return _Pointer(self.__array_interface__["data"][0])

    def get(self):
        log.append("get")
        return self._values()

    def _values(self):
        _current[0].synchronize()
        with touching_memory():
            return np.array(self.view(np.ndarray))

    def __setitem__(self, index, values):
        values = values._values() if isinstance(values, ndarray) else np.array(values)
        _current[0].synchronize()
        with touching_memory():
            self.view(np.ndarray)[index] = values

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        if eager:
            out = {} if out is None else {"out": tuple(map(_plain, out))}
            result = getattr(ufunc, method)(*map(_plain, inputs), **out, **options)
            return result.view(ndarray) if isinstance(result, np.ndarray) else result
        values = [x._values() if isinstance(x, ndarray) else x for x in inputs]
        result = getattr(ufunc, method)(*values, **options)
        if out is None:
            return asarray(result)
        out[0][...] = result
        return out[0]

    def __array_function__(self, function, types, args, kwargs):
        if eager:
            return super().__array_function__(function, types, args, kwargs)
        assert function in (np.zeros_like, np.empty_like), f"{function} on a device array"
        shape = kwargs.get("shape")
        made = _arena.empty(
            self.shape if shape is None else shape, kwargs.get("dtype") or self.dtype
        )
        made[...] = 0
        return made


def _plain(x):
    return x.view(np.ndarray) if isinstance(x, ndarray) else x


def asarray(values):
    values = np.asarray(values)
    made = _arena.empty(values.shape, values.dtype)
    made[...] = values
    return made


def may_share_memory(a, b):
    return np.may_share_memory(a, b)


def install():
    """The module under the name of cupy."""
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
    sys.modules["cupy"] = sys.modules[__name__]
    this = sys.modules[__name__]
    this.cuda = types.SimpleNamespace(
        Device=Device,
        Event=Event,
        Stream=Stream,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=lambda: _current[0],
        is_available=lambda: True,
        runtime=runtime,
    )
    return this
