"""CuPy's place in tests without a GPU: ``install()`` puts this module into ``sys.modules``.

Its ``ndarray`` is a class of its own, so that the library takes it for CuPy's and goes the way of
CUDA: every layer runs on it. It holds the memory of a NumPy array, and refuses what CuPy refuses:
mixing with NumPy arrays, becoming one without being asked, arrays of another device in a kernel.

Kernels run on the CPU, in the machine for PTX (``tests/ptx``), one after the other. Besides,

* ``do_nothing()``: kernels are not even compiled, for counting and timing what Python does;
* ``put_off()``: copies and kernels wait in their stream's queue until somebody waits for them or an
  event behind them, the latest moment CUDA allows: a host that does not wait reads what was there
  before. Freed pinned memory is overwritten at once;
* ``guard_memory()``: the same, in device memory that nobody but its copies and kernels can touch.
  Its pages are protected, so whoever reads a device pointer on the host, MPI for instance, dies of
  a segmentation fault, as with a real one.

With ``tests/stand_in`` on the path, ``import cupy`` imports it.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
import time
import types
import weakref
from collections import Counter, deque
from contextlib import contextmanager

import numpy as np

__version__ = "14.0"
SIZE = 1 << 28  # of guarded memory
DEVICES = 2
RESIDENT = 3  # blocks of any kernel on a multiprocessor
SHARED = 227 << 10  # bytes of shared memory that a block can ask for
_NONE, _READ_WRITE = 0, 3
_libc = ctypes.CDLL(None, use_errno=True)

happened = []  # what happened, in order: "get", "event wait", "pinned", ...
launched = Counter()  # kernels, by their names


def _module(text, names):
    from ptx.launch import compile_module

    return compile_module(text, names)


class _State:
    """How device memory and kernels behave."""

    lazy = False  # streams put off what they can
    arena = None  # where memory is guarded
    open_to_all = False  # as if MPI could follow device pointers
    hook = None  # is told of every allocation
    allocator = None  # of CuPy's pool, if None
    build = staticmethod(_module)  # (text, names) to a module with get_function(name)


def install():
    """The module under the name of cupy, and as it is at first."""
    _State.arena, _State.open_to_all, _State.allocator = None, False, None
    _State.lazy = False
    build_with(_module)
    _here.__dict__.clear()
    _null.__init__()
    happened.clear()
    launched.clear()
    sys.modules["cupy"] = sys.modules[__name__]
    return sys.modules[__name__]


def do_nothing():
    """From now on kernels do nothing."""
    build_with(lambda text, names: types.SimpleNamespace(get_function=lambda name: _no_kernel))


def _no_kernel(grid, block, arguments, shared_mem=0):
    pass


def build_with(build):
    """From now on kernels come from ``build(text, names)``."""
    _State.build = staticmethod(build)


def put_off():
    """From now on streams put off what they can."""
    _State.lazy = True


def guard_memory():
    """From now on device memory is guarded, and streams put off what they can."""
    put_off()
    _State.arena = _Arena()


def open_memory():
    """As a CUDA-aware MPI sees it: guarded memory that can be followed to."""
    _State.open_to_all = True
    _State.arena.protect(_READ_WRITE)


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

    def empty(self, size):
        begin, self.used = self.used, self.used + -(-size // 512) * 512
        assert self.used <= SIZE
        return np.ndarray.__new__(np.ndarray, (size,), np.uint8, self.memory, begin)


@contextmanager
def touching_memory():
    """The device at work: its memory can be read and written."""
    arena = _State.arena
    if arena is None:
        yield
        return
    arena.depth += 1
    arena.protect(_READ_WRITE)
    try:
        yield
    finally:
        arena.depth -= 1
        if not (arena.depth or _State.open_to_all):
            arena.protect(_NONE)


# Memory


class MemoryPool:
    """What is allocated, in bytes."""

    def __init__(self, allocator=None):
        self.used = 0

    def malloc(self, size):
        return MemoryPointer(_Memory(size, self), 0, _here.device)

    def used_bytes(self):
        return self.used

    total_bytes = used_bytes

    def free_all_blocks(self):
        pass


_pool = MemoryPool()


class _Memory:
    """One allocation: bytes of rubbish."""

    def __init__(self, size, pool=_pool):
        self.size, self.pool = size, pool
        if _State.arena is not None:
            self.bytes = _State.arena.empty(size)
        else:
            self.bytes = np.empty(size, np.uint8)
            self.bytes.fill(0xAB)
            assert not _address(self.bytes) % 16
        pool.used += size
        if _State.hook is not None:
            _State.hook.malloc_postprocess(size=size)

    @staticmethod
    def alone(size):
        return MemoryPointer(_Memory(size), 0, _here.device)

    def __del__(self):
        self.pool.used -= self.size


class MemoryPointer:
    def __init__(self, mem, ptr, device):
        self.mem, self.ptr, self.device_id = mem, ptr, device

    @property
    def device(self):
        return Device(self.device_id)

    def copy_to_host_async(self, mem, size, stream=None):
        happened.append("to host")
        kept = self.mem
        _stream(stream).launch(lambda: kept and ctypes.memmove(mem, self.ptr, size))

    def copy_from_host_async(self, mem, size, stream=None):
        happened.append("from host")
        kept = self.mem
        _stream(stream).launch(lambda: kept and ctypes.memmove(self.ptr, mem, size))


def _address(array):
    return array.__array_interface__["data"][0]  # array.ctypes makes Python frames in NumPy


class _Flags:
    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = flags.owndata


class ndarray:
    """`memory` is the NumPy array; a test that plays a kernel may write to it."""

    __slots__ = ("__weakref__", "data", "memory")
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        device = _device()
        allocator = _State.allocator
        block = _Memory(size) if allocator is None else allocator(size).mem
        self.memory = np.ndarray.__new__(np.ndarray, shape, dtype, block.bytes, order=order)
        self.data = MemoryPointer(block, _address(self.memory), device)

    shape = property(lambda self: self.memory.shape)
    strides = property(lambda self: self.memory.strides)
    dtype = property(lambda self: self.memory.dtype)
    size = property(lambda self: self.memory.size)
    ndim = property(lambda self: self.memory.ndim)
    nbytes = property(lambda self: self.memory.nbytes)
    itemsize = property(lambda self: self.memory.itemsize)
    flags = property(lambda self: _Flags(self.memory.flags))
    device = property(lambda self: Device(self.data.device_id))
    T = property(lambda self: _view(self.memory.T, self))

    def get(self, stream=None, order="C", out=None):
        happened.append("get")
        return self._values()

    def _values(self):
        get_current_stream().synchronize()
        with touching_memory():
            return np.array(self.memory)

    def __array__(self, *args, **options):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return _run(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function, types, args, kwargs):
        if function in (np.empty_like, np.zeros_like):
            return globals()[function.__name__](*args, **kwargs)
        return _run(function, args, kwargs)

    def __getitem__(self, index):
        indices = index if type(index) is tuple else (index,)
        assert not any(isinstance(i, np.ndarray) for i in indices), f"{index!r} of a device array"
        basic = all(i is None or i is ... or isinstance(i, slice) for i in indices)
        if basic or (self.ndim > 1 and isinstance(index, int)):
            return _view(self.memory[index], self)
        return _run(np.ndarray.__getitem__, (self, index), {})

    def __setitem__(self, index, values):
        index, values, memory = _plain(index), _plain(values), self.memory
        get_current_stream().launch(lambda: memory.__setitem__(index, values))

    def fill(self, value):
        self[...] = value

    def reshape(self, *shape, order="C"):
        if self.memory.flags.c_contiguous and order == "C":
            return _view(self.memory.reshape(*shape), self)
        return _run(np.ndarray.reshape, (self, *shape), {"order": order})

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __len__(self):
        return len(self.memory)

    def __bool__(self):
        return bool(self._values())

    def __int__(self):
        return int(self._values())

    def __float__(self):
        return float(self._values())

    def __repr__(self):
        return repr(self._values())

    def item(self):
        return self._values().item()

    def tolist(self):
        return self._values().tolist()

    @property
    def __cuda_array_interface__(self):
        return self.memory.__array_interface__ | {"version": 3, "stream": None}

    def __dlpack_device__(self):
        return 2, self.data.device_id

    def __dlpack__(self, stream=None, max_version=None, dl_device=None, copy=None):
        return self.memory.__dlpack__(max_version=max_version)

    def __reduce__(self):
        return asarray, (self._values(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    def copy(self, order="C"):
        return _run(np.ndarray.copy, (self, order), {})

    def astype(self, dtype, order="K", copy=True):
        options = {"order": order, "copy": copy}
        return _run(np.ndarray.astype, (self, dtype), options)


if np.lib.NumpyVersion(np.__version__) < "2.1.0":  # whose DLPack knows no versions, as MPI's does
    del ndarray.__dlpack__, ndarray.__dlpack_device__


def _method(name):
    function = getattr(np.ndarray, name)
    return lambda self, *args, **options: _run(function, (self, *args), options)


for _name in (
    *("all", "any", "argmax", "argmin", "clip", "flatten", "max", "mean", "min", "prod", "ravel"),
    *("repeat", "sort", "std", "sum", "var"),
):
    setattr(ndarray, _name, _method(_name))


def _view_method(name):
    function = getattr(np.ndarray, name)
    return lambda self, *args: _view(function(self.memory, *args), self)


for _name in ("squeeze", "swapaxes", "transpose", "view"):
    setattr(ndarray, _name, _view_method(_name))


def _operator(name, ufunc):
    def forward(self, other):
        return _run(ufunc, (self, other), {})

    def backward(self, other):
        return _run(ufunc, (other, self), {})

    def in_place(self, other):
        return _run(ufunc, (self, other), {"out": (self,)})

    for prefix, function in (("", forward), ("r", backward), ("i", in_place)):
        setattr(ndarray, f"__{prefix}{name}__", function)


for _name, _ufunc in (
    *(("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("truediv", np.divide)),
    *(("floordiv", np.floor_divide), ("mod", np.remainder), ("pow", np.power)),
    *(("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)),
    *(("lshift", np.left_shift), ("rshift", np.right_shift), ("matmul", np.matmul)),
):
    _operator(_name, _ufunc)
for _name, _ufunc in (
    *(("lt", np.less), ("le", np.less_equal), ("eq", np.equal), ("ne", np.not_equal)),
    *(("gt", np.greater), ("ge", np.greater_equal)),
):
    setattr(ndarray, f"__{_name}__", lambda a, b, ufunc=_ufunc: _run(ufunc, (a, b), {}))
for _name, _ufunc in (("neg", np.negative), ("abs", np.abs), ("invert", np.invert)):
    setattr(ndarray, f"__{_name}__", lambda a, ufunc=_ufunc: _run(ufunc, (a,), {}))


def _plain(x):
    if isinstance(x, ndarray):
        return x.memory
    if isinstance(x, np.ndarray) and x.ndim:
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, list | tuple):
        return (list if isinstance(x, list) else tuple)(map(_plain, x))
    return x


def _run(function, args, options):
    """Device arrays as NumPy arrays, after the work of the current stream so far."""
    get_current_stream().synchronize()
    out = options.get("out")
    with touching_memory():
        plain = {name: _plain(value) for name, value in options.items()}
        result = function(*map(_plain, args), **plain)
        if out is not None:
            return out[0] if type(out) is tuple else out
        return _device_arrays(result, next(_arrays_in(args), None))


def _arrays_in(args):
    for x in args:
        if isinstance(x, ndarray):
            yield x
        elif isinstance(x, list | tuple):
            yield from _arrays_in(x)


def _device_arrays(result, of):
    if type(result) in (list, tuple):
        return type(result)(_device_arrays(x, of) for x in result)
    if isinstance(result, np.generic):
        result = np.array(result)
    if not isinstance(result, np.ndarray):
        return result
    if of is not None and not result.flags.owndata and np.may_share_memory(result, of.memory):
        return _view(result, of)
    return _made_of(result)


def _view(memory, of):
    """An array over part of another one's memory."""
    view = ndarray.__new__(ndarray)
    view.memory = memory
    view.data = MemoryPointer(of.data.mem, _address(memory), of.data.device_id)
    return view


def _made_of(values):
    order = "F" if values.flags.f_contiguous and not values.flags.c_contiguous else "C"
    made = ndarray(values.shape, values.dtype, order=order)
    with touching_memory():
        made.memory[...] = values
    return made


def over(memory):
    """A device array over the memory of a NumPy array, of whatever alignment."""
    device = _device()
    made = ndarray.__new__(ndarray)
    made.memory = memory
    made.data = MemoryPointer(memory, _address(memory), device)
    return made


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order=order)


def zeros(shape, dtype=float, order="C"):
    made = ndarray(shape, dtype, order=order)
    with touching_memory():
        made.memory.fill(0)
    return made


def ones(shape, dtype=float):
    made = zeros(shape, dtype)
    made[...] = 1
    return made


def empty_like(x, dtype=None, order="K", subok=None, shape=None):
    return ndarray(x.shape if shape is None else shape, x.dtype if dtype is None else dtype)


def zeros_like(x, dtype=None, order="K", subok=None, shape=None):
    return zeros(x.shape if shape is None else shape, x.dtype if dtype is None else dtype)


def array(values, dtype=None, copy=True):
    if isinstance(values, ndarray):
        return values.astype(dtype or values.dtype, copy=copy)
    return _made_of(np.array(values, dtype))


class _OnHost:
    """What NumPy takes over by DLPack."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(max_version=options.get("max_version"))

    def __dlpack_device__(self):
        return 1, 0


def from_dlpack(values):
    return over(np.from_dlpack(_OnHost(values)))


def _over_interface(owner):
    interface = owner.__cuda_array_interface__
    shape, dtype = interface["shape"], np.dtype(interface["typestr"])
    strides = interface["strides"] or np.empty(shape, dtype).strides
    extent = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
    values = (ctypes.c_char * extent).from_address(interface["data"][0])
    return over(np.ndarray.__new__(np.ndarray, shape, dtype, values, 0, strides))


def asarray(values, dtype=None):
    if hasattr(values, "__cuda_array_interface__") and not isinstance(values, ndarray):
        return _over_interface(values)
    if isinstance(values, ndarray):
        return values if dtype is None else values.astype(dtype, copy=False)
    return _made_of(np.array(values, dtype))


def asnumpy(values):
    return values.get() if isinstance(values, ndarray) else np.asarray(values)


def ascontiguousarray(values):
    return values if values.flags.c_contiguous else values.copy()


def may_share_memory(a, b):
    return np.may_share_memory(a.memory, b.memory)


shares_memory = may_share_memory


def __getattr__(name):
    """Everything else is NumPy's, on device arrays."""
    if name.startswith("__") or not hasattr(np, name):
        raise AttributeError(name)
    found = getattr(np, name)
    if isinstance(found, type) or not callable(found):
        return found
    return lambda *args, **options: _run(found, args, options)


# Streams, events and devices


class _Here(threading.local):
    """What is current in a thread."""

    device = 0
    stream = None


_here = _Here()


def _device():
    return _here.device


_streams = weakref.WeakSet()


class Stream:
    ptr = 0

    def __init__(self, null=False, non_blocking=False):
        self.queue, self.done, self.before, self.captured = deque(), 0, [], None
        self.lock = threading.RLock()
        _streams.add(self)
        if self is not globals().get("_null", self):
            self.ptr = id(self)

    @property
    def enqueued(self):
        return self.done + len(self.queue)

    def launch(self, work):
        """Enqueues a kernel: a function without arguments."""
        if self.captured is not None:
            self.captured.append(work)
            return
        self.queue.append(work)
        if not _State.lazy:
            self.synchronize()

    def run_to(self, position):
        with self.lock:
            while self.done < position:
                work = self.queue.popleft()
                self.done += 1
                with touching_memory():
                    work()

    def synchronize(self):
        if self.captured is not None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: a wait while capturing")
        self.run_to(self.enqueued)

    def record(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event):
        self.launch(event.finish)

    def begin_capture(self, mode=None):
        self.captured = []

    def end_capture(self):
        captured, self.captured = self.captured, None
        return _Graph(captured)

    def is_capturing(self):
        return self.captured is not None

    def __enter__(self):
        self.before.append(_here.stream)
        _here.stream = self
        return self

    def __exit__(self, *error):
        _here.stream = self.before.pop()


class _Graph:
    def __init__(self, captured):
        self.captured = captured

    def launch(self, stream=None):
        for work in self.captured:
            _stream(stream).launch(work)


_null = Stream()
Stream.null = _null


def get_current_stream(device_id=-1):
    return _here.stream or _null


def _stream(given):
    return get_current_stream() if given is None else given


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.point = None

    def record(self, stream=None):
        stream = _stream(stream)
        self.point = stream, stream.enqueued
        self.at = time.perf_counter()

    @property
    def done(self):
        return self.point is None or self.point[0].done >= self.point[1]

    def finish(self):
        if self.point is not None:
            self.point[0].run_to(self.point[1])

    def synchronize(self):
        happened.append("event wait")
        self.finish()


class Device:
    compute_capability = "90"
    attributes = types.MappingProxyType(
        {"L2CacheSize": 1 << 20, "MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": SHARED}
    )

    def __init__(self, device=None):
        self.id = _here.device if device is None else int(device)
        self.before = []

    def __enter__(self):
        self.before.append(_here.device)
        _here.device = self.id
        return self

    def __exit__(self, *error):
        _here.device = self.before.pop()

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return self.id

    def __int__(self):
        return self.id

    def use(self):
        _here.device = self.id

    def synchronize(self):
        for stream in list(_streams):
            stream.synchronize()


# Pinned memory

_pinned_pool = []


class _Pinned(np.ndarray):
    def __del__(self):
        if self.base is not None and self.base.base is None:
            self.base[...] = 0xAB  # others have it now


def alloc_pinned_memory(size):
    happened.append("pinned")
    _pinned_pool.append(np.zeros(size, np.uint8))
    return _pinned_pool[-1].view(_Pinned)


def is_pinned(array):
    """Whether a host array lies in pinned memory."""
    begins = ((_address(block), block.nbytes) for block in _pinned_pool)
    return any(begin <= _address(array) < begin + size for begin, size in begins)


# Kernels

_EXPORTED = re.compile(r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\)\s*)?(\w+)')


class RawModule:
    def __init__(self, code, options=(), name_expressions=None, **more):
        names = re.findall(
            r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\)\s*)?(\w+)', code
        )
        self.module = _State.build(code, names)

    def compile(self, log_stream=None):
        pass

    def get_function(self, name):
        return _Kernel(self.module.get_function(name), name)


class RawKernel:
    def __init__(self, code, name, options=(), **more):
        spins = "clock64" in code  # as long as its stream is busy
        function = (lambda *_: None) if spins else _State.build(code, [name]).get_function(name)
        self.kernel = _Kernel(function, name)

    def __call__(self, grid, block, args, **options):
        self.kernel(grid, block, args, **options)


class CUDADriverError(RuntimeError):
    pass


class _Kernel:
    def __init__(self, function, name):
        self.function, self.name = function, name
        self.kernel = types.SimpleNamespace(ptr=id(function))
        self._shared = 48 << 10

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._shared

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if size > SHARED:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self._shared = size
        if hasattr(self.function, "max_dynamic_shared_size_bytes"):  # it runs
            self.function.max_dynamic_shared_size_bytes = size

    def __call__(self, grid, block, args, **options):
        launched[self.name] += 1
        if self.function is _no_kernel:
            return
        for x in args:
            assert x is not None, "CuPy passes no null pointer"
            if isinstance(x, ndarray) and x.data.device_id != _here.device:
                raise ValueError(
                    f"Array device must be same as the current device: array device = "
                    f"{x.data.device_id} while current = {_here.device}"
                )
        plain = [x.memory if isinstance(x, ndarray) else x for x in args]
        get_current_stream().launch(lambda: self.function(grid, block, plain, **options))


# Modules of CuPy


class MemoryHook:
    def __enter__(self):
        _State.hook = self
        return self

    def __exit__(self, *error):
        _State.hook = None


def get_default_memory_pool():
    return _pool


def set_allocator(allocator=None):
    _State.allocator = allocator or _Memory.alone


def get_allocator():
    return _State.allocator


def get_elapsed_time(begin, end):
    return (end.at - begin.at) * 1e3


cuda = types.SimpleNamespace(
    Device=Device,
    Event=Event,
    MemoryAsyncPool=MemoryPool,
    MemoryPointer=MemoryPointer,
    MemoryPool=MemoryPool,
    Stream=Stream,
    alloc_pinned_memory=alloc_pinned_memory,
    driver=types.SimpleNamespace(
        CUDADriverError=CUDADriverError,
        occupancyMaxActiveBlocksPerMultiprocessor=lambda function, threads, shared: RESIDENT,
    ),
    get_allocator=get_allocator,
    get_current_stream=get_current_stream,
    get_elapsed_time=get_elapsed_time,
    is_available=lambda: True,
    malloc_async=_Memory.alone,
    memory_hook=types.SimpleNamespace(MemoryHook=MemoryHook),
    runtime=types.SimpleNamespace(
        driverGetVersion=lambda: 13000,
        getDeviceCount=lambda: DEVICES,
        getDeviceProperties=lambda device: {
            "name": b"Stand-in",
            "major": 9,
            "minor": 0,
            "totalGlobalMem": 141 << 30,
        },
        memGetInfo=lambda: (1 << 33, 1 << 34),
        runtimeGetVersion=lambda: 12090,
    ),
    set_allocator=set_allocator,
)
