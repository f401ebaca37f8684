"""Arrays of NumPy, CuPy and other libraries: their memory, dtypes and devices."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, repeat
from operator import setitem
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from .errors import DeviceError, DTypeError

Array: TypeAlias = Any
"""A ``numpy.ndarray`` or a ``cupy.ndarray``."""

_CPU_DEVICES = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost
_GPU_DEVICES = (2, 10, 13)  # kDLCUDA, kDLROCM and kDLCUDAManaged: what CuPy takes
_LARGE = 1 << 22  # bytes, as NumPy has it
_HUGE_PAGES = 14  # MADV_HUGEPAGE
_madvise: Any = None
if sys.platform == "linux":
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class DataType(NamedTuple):
    """A dtype that data may have.

    Attributes:
        arithmetic: the dtype of parameters, running statistics and the arithmetic.
        cuda: its name in the kernels' sources.
        bits: the integers that stand for it in libraries that do not know it; None: all know it.
    """

    arithmetic: str
    cuda: str
    bits: str | None = None


DATA_TYPES = {
    "float16": DataType("float32", "float16", "int16"),
    "bfloat16": DataType("float32", "bfloat16", "uint16"),
    "float32": DataType("float32", "float"),
    "float64": DataType("float64", "double"),
}


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array; never imports CuPy."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cast(type, cupy.ndarray))


def as_array(x: object, what: str = "input") -> Array:
    """x as a NumPy or CuPy array over the same memory, on the same device; it may be read-only.

    Takes NumPy and CuPy arrays, memoryviews, and what offers DLPack, ``__cuda_array_interface__``,
    ``__array__`` or ``__array_interface__``: PyTorch tensors, JAX arrays, Numba's device arrays.
    bfloat16 comes as ``ml_dtypes.bfloat16``. Only two kinds may be copied: an object that has only
    ``__array__``, and a PyTorch tensor with a pending negation.

    Raises:
        DTypeError: x is none of these (a list, a number, ...), has no form as an array, is a
            masked array, whose mask would be lost silently, or a PyTorch tensor that requires grad,
            whose graph would end here silently.
        DeviceError: x is on a device that needs CuPy, and CuPy is not installed; or on one that is
            neither the CPU nor a GPU.
    """
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise DTypeError(
                f"{what} is a masked array, whose mask would be lost: pass its .filled(value), or "
                "its .data where the mask does not matter"
            )
        return np.asarray(x)
    if is_cupy(x):
        return x
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, cast(type, torch.Tensor)):
        return _of_tensor(x, what, torch)
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        return _of_dlpack(x, what)
    if hasattr(x, "__cuda_array_interface__"):
        return cupy_for(what).asarray(x)
    if isinstance(x, memoryview) or hasattr(x, "__array__") or hasattr(x, "__array_interface__"):
        with _errors_of(what):
            return np.asarray(x)
    raise DTypeError(
        f"{what} must be a NumPy or CuPy array, or offer DLPack, __cuda_array_interface__ or "
        f"__array__; got {type(x).__name__}"
    )


def _of_tensor(x: Any, what: str, torch: Any) -> Array:
    if x.requires_grad:
        raise DTypeError(
            f"{what} is a PyTorch tensor that requires grad, and its graph would end here: pass "
            "its .detach(), or use the modules of cupybn.interop.torch, which autograd knows"
        )
    return array_of_tensor(x, what)


Bytes: Any = ctypes.c_char * sys.maxsize
"""Memory from an address on, of a length that is not known."""


def array_of_tensor(x: Any, what: str = "input") -> Array:
    """:func:`as_array` for a PyTorch tensor, which may require grad; the array keeps it alive.

    ``tensor.numpy()`` would mark the storage so that it could never be resized again, and FSDP
    frees parameters by resizing. DLPack does not mark it, but gives NumPy before 2.2 a read-only
    array. So on the CPU the array is made from the tensor's address.
    """
    kind: Any = type(x)
    if x.is_meta or kind.__torch_dispatch__ is not sys.modules["torch"].Tensor.__torch_dispatch__:
        raise DeviceError(
            f"{what} is a {kind.__name__} on {x.device}, which is neither on the CPU nor on a GPU, "
            "or stands for other tensors: pass a plain tensor with values"
        )
    if x.is_neg():  # the memory has the values before the negation
        x = x.resolve_neg()
    if not x.is_cpu:
        return _of_tensor_elsewhere(x, what)
    try:
        address, dtype = x.data_ptr(), _dtype_of(x.dtype)
        if not address and x.numel():
            raise RuntimeError("its memory was freed, or never allocated")
    except (ImportError, RuntimeError, TypeError) as error:
        raise DTypeError(f"{what}: NumPy cannot take this tensor over: {error}") from error
    if not address:
        return np.empty(x.shape, dtype)
    memory: Any = Bytes.from_address(address)
    memory.tensor = x
    if x.is_contiguous():
        return np.ndarray(x.shape, dtype, memory)
    return np.ndarray(x.shape, dtype, memory, 0, [step * dtype.itemsize for step in x.stride()])


def memory_of(tensor: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The memory of a dense PyTorch tensor on the CPU, in memory order.

    For new tensors: nothing is checked, and the caller keeps the tensor alive. For a large one
    Linux is asked for huge pages, as NumPy does for its arrays. PyTorch does not ask, and its new
    pages in each step take as long as the arithmetic.
    """
    address = tensor.data_ptr()
    array = np.ndarray(shape, dtype, Bytes.from_address(address))
    if array.nbytes >= _LARGE and _madvise is not None:
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        _madvise(begin, address + array.nbytes - begin, _HUGE_PAGES)  # only advice: it may fail
    return array


def _of_tensor_elsewhere(x: Any, what: str) -> Array:
    with _errors_of(what):
        dtype = _dtype_of(x.dtype)
    x = x.detach()
    if dtype.name == "bfloat16":  # which DLPack does not know
        x = x.view(sys.modules["torch"].int16)
    return _of_dlpack(x, what).view(dtype)


@lru_cache(maxsize=64)
def _dtype_of(dtype: Any) -> np.dtype[Any]:
    """NumPy's dtype of the same name as PyTorch's."""
    return dtype_named(str(dtype).removeprefix("torch."), "the tensor")


def _of_dlpack(x: Any, what: str) -> Array:
    with _errors_of(what):
        device = int(x.__dlpack_device__()[0])
    if device in _GPU_DEVICES:
        return cupy_for(what).from_dlpack(x)
    if device not in _CPU_DEVICES:
        raise DeviceError(f"{what} is neither on the CPU nor on a GPU, but on DLPack's {device}")
    with _errors_of(what):
        try:
            return np.from_dlpack(x)
        except (BufferError, RuntimeError):
            if not hasattr(x, "__array__"):
                raise
        return np.asarray(x)  # JAX's bfloat16


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """A context that turns what another library's array raises into DTypeError."""
    try:
        yield
    except (AttributeError, BufferError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise DTypeError(f"{what}: NumPy cannot take this array over: {error}") from error


def as_written(x: object, what: str) -> Array:
    """:func:`as_array` for an argument that is written to.

    Raises:
        DTypeError: what is written could not be seen in x, because no array shares its
            memory.
        ValueError: x is read-only.
    """
    array = as_array(x, what)
    shares = ("__dlpack__", "__cuda_array_interface__", "__array_interface__")
    if not (isinstance(x, memoryview) or any(hasattr(x, name) for name in shares)):
        raise DTypeError(f"{what}: a {type(x).__name__} may give a copy of itself to write to")
    if not getattr(array.flags, "writeable", True):
        raise ValueError(f"{what} is read-only")
    return array


def cupy_for(what: str) -> Any:
    """CuPy; raises DeviceError if it is not installed."""
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise DeviceError(
            f"{what}: CUDA devices need CuPy: pip install cupy-cuda13x (or cupy-cuda12x)"
        ) from error
    return cupy


def device_of(x: Array) -> str:
    """``"cpu"``, or ``"cuda:<n>"`` for a CuPy array."""
    return f"cuda:{x.device.id}" if is_cupy(x) else "cpu"


def on_device_of(x: Array) -> Any:
    """A context in which CuPy allocates and launches on the array's device."""
    return x.device if is_cupy(x) else nullcontext()


def is_capturing(x: Array) -> bool:
    """Whether work on x goes into a CUDA graph that is being captured."""
    return is_cupy(x) and bool(sys.modules["cupy"].cuda.get_current_stream().is_capturing())


def check_device(device: str | None) -> str:
    """The canonical name of a ``device=`` argument: ``"cpu"`` for None, else ``"cuda:<n>"``.

    ``"cuda"`` is CuPy's current device. Does not touch CUDA for the CPU.

    Raises:
        DeviceError: there is no such device, or CuPy is not installed.
    """
    if device is None or device == "cpu":
        return "cpu"
    name, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if name != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise DeviceError(f"device must be None, 'cpu', 'cuda' or 'cuda:<n>', got {device!r}")
    cupy = cupy_for(f"device={device!r}")
    devices = cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    index = int(number) if number else cupy.cuda.Device().id if devices else 0
    if index >= devices:
        raise DeviceError(f"device {device!r}: CuPy sees {devices} CUDA devices on this machine")
    return f"cuda:{index}"


def move(x: Array, device: str) -> Array:
    """x on the device (a canonical name): x itself if it is there already, else a copy."""
    if device_of(x) == device:
        return x
    host = copy_to_host(x)
    if device == "cpu":
        return host
    cupy = cupy_for("the array to move")
    with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
        return cupy.asarray(host)


@lru_cache(maxsize=64)  # the name of a dtype takes NumPy microseconds
def parameter_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of parameters and running statistics, and of the arithmetic, for data of `dtype`.

    float16, bfloat16 and float32 data go with float32, float64 data with float64.

    Raises:
        DTypeError: any other dtype, integers and non-native byte orders included.
    """
    dtype = np.dtype(dtype)
    found = DATA_TYPES.get(dtype.name)
    if found is not None and not dtype.isnative:
        raise DTypeError(
            f"unsupported dtype {dtype}, in the byte order of other machines: convert with "
            f".astype(np.{dtype.name})"
        )
    if found is None:
        raise DTypeError(
            f"unsupported dtype {dtype}: batch norm takes float16, bfloat16, float32 and float64"
        )
    return np.dtype(found.arithmetic)


def dtype_named(name: str, what: str = "what is asked for") -> np.dtype[Any]:
    """The dtype of that name. bfloat16 comes from ``ml_dtypes``; NumPy has none.

    Raises:
        ImportError: `what` is bfloat16, and ml_dtypes is not installed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        return np.dtype(import_module("ml_dtypes").bfloat16)  # type: ignore[no-any-return]
    except ImportError as error:
        raise ImportError(
            f"{what} is bfloat16, which needs ml_dtypes: pip install ml_dtypes"
        ) from error


def is_floating(dtype: Any) -> bool:
    """Whether dtype is a floating one, bfloat16 included (NumPy calls its kind "V")."""
    dtype = np.dtype(dtype)
    return bool(dtype.kind == "f" or dtype.name in DATA_TYPES)


def copy_to_host(x: Array) -> np.ndarray[Any, Any]:
    """A new NumPy array with the values of x, C-contiguous."""
    return np.array(x.get() if is_cupy(x) else x, order="C", copy=True)


def assign(target: Array, values: Array) -> None:
    """Copies values into an array of the same shape, from any device to any, converting them."""
    if is_cupy(values) and device_of(values) != device_of(target):
        values = copy_to_host(values)
    with on_device_of(target):
        if is_cupy(target) and not is_cupy(values):
            values = cupy_for("the target").asarray(values)
        target[...] = values


def assign_all(targets: list[Array], values: list[Array]) -> None:
    """:func:`assign` for each of them; NumPy's in one call of C, which no interrupt can split."""
    if any(is_cupy(array) for array in (*targets, *values)):
        for target, value in zip(targets, values, strict=True):
            assign(target, value)
    else:
        deque(map(setitem, targets, repeat(...), values), maxlen=0)


def cut(flat: Array, sizes: Sequence[int]) -> list[Array]:
    """The pieces of a flat array, end to end, of these sizes: views."""
    spans = [(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return [flat[begin:end] for begin, end in spans]


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; True where that is too costly to decide."""
    if is_cupy(a) or is_cupy(b):
        return bool(device_of(a) == device_of(b) and sys.modules["cupy"].may_share_memory(a, b))
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays have the same elements at the same addresses."""
    if is_cupy(a) != is_cupy(b) or a.shape != b.shape or a.strides != b.strides:
        return False
    if is_cupy(a):
        return bool(a.data.ptr == b.data.ptr)
    return bool(a.ctypes.data == b.ctypes.data)
