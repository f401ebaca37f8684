"""Gradients, parameters and devices of a training loop over several ranks.

All but ``local_device`` are collective: every rank calls them, in the same order. If a rank fails,
the others raise ``PeerError``; ranks whose trees differ all raise ``CollectiveMismatchError``.

``allreduce_gradients`` sends one message with all gradients: trees that differ so much that their
messages have different lengths (a header and a power of two of numbers) or dtypes end the job.
``broadcast_parameters`` and ``verify_sync`` first compare the trees in a message of fixed length,
so either of them at the start of a run finds such a difference.

An interrupt on one rank (Ctrl-C) leaves its NumPy arrays all as they were or all replaced.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np

from .arrays import (
    Array,
    assign,
    assign_all,
    copy_to_host,
    cut,
    device_of,
    is_floating,
    on_device_of,
)
from .checks import check_writeable
from .collective import CollectiveCall
from .communicators import MpiCommunicator, ThreadCommunicator, resolve
from .errors import CollectiveMismatchError, DeviceError, DTypeError
from .launcher import local_rank
from .layers import Layer
from .statistics import padded_length

Named: TypeAlias = "list[tuple[str, Array]]"
"""Arrays with their paths, in an order that is the same on all ranks."""

_HOST = np.zeros(0)
_SHORTEST = padded_length(0)  # of a message whose length does not depend on the arrays
_PIECES = 3  # of 20 bits each, of the hash of one array


def allreduce_gradients(layer: Layer, comm: Any = None, op: str = "mean") -> None:
    """Replaces every gradient of the tree by its mean or sum over the ranks, in one message.

    The message is float32, or float64 if any gradient is. With batches of different sizes divide
    the loss by the global number of samples and use ``op="sum"``.

    Args:
        layer: the root; the same tree on every rank.
        comm: as for SyncBatchNorm; None is ``MPI.COMM_WORLD``.
        op: "mean" or "sum".

    Gradients that are all on one device are summed there, in a message of that device; others in
    host memory.

    Raises:
        ValueError: another op.
        DTypeError: a gradient that is not floating. ValueError: one that is read-only.
        TypeError: `layer` is not a Layer.
        PeerError, CollectiveMismatchError: see above. The gradients are unchanged then.
    """
    _check_tree(layer)
    allreduce_arrays(list(layer.named_gradients()), comm, op)


def allreduce_arrays(named: Named, comm: Any = None, op: str = "mean") -> None:
    """:func:`allreduce_gradients` for gradients by name."""
    communicator = resolve(comm)
    arrays = [grad for _, grad in named if hasattr(grad, "dtype")]  # if not all, this raises below
    wide = any(array.dtype.itemsize > 4 for array in arrays)
    dtype = np.dtype(np.float64 if wide else np.float32)
    length = padded_length(sum(array.size for array in arrays))
    # An odd number of float32 values never has as many bytes as a message of float64 values.
    length += 0 if wide else 1
    # On their device if all are on one, else in host memory.
    beside = arrays[0] if len(set(map(device_of, arrays))) == 1 else _HOST
    with on_device_of(beside):
        with CollectiveCall(communicator, "allreduce_gradients", length, dtype=dtype) as call:
            if op not in ("mean", "sum"):
                raise ValueError(f"op must be 'mean' or 'sum', got {op!r}")
            for name, grad in named:
                check_writeable(f"the gradient of {name!r}", grad)
                if not is_floating(grad.dtype):
                    raise DTypeError(f"the gradient of {name!r} is {grad.dtype}, not floating")
            call.agree({"op": op, "": outline(named)})
            if communicator.size == 1:
                return
            total = _allreduce(call, arrays, beside)
        if op == "mean":
            total /= communicator.size
        sums = cut(total, [array.size for array in arrays])
        with np.errstate(all="ignore"):  # a sum too large for its gradient's dtype becomes Inf
            assign_all(
                arrays, [part.reshape(a.shape) for part, a in zip(sums, arrays, strict=True)]
            )


def broadcast_parameters(layer: Layer, comm: Any = None, root: int = 0) -> None:
    """Copies the parameters and buffers of rank `root` to every rank, bit for bit.

    Args:
        layer: the root of the tree; the same tree on every rank.
        comm: as for SyncBatchNorm; None is ``MPI.COMM_WORLD``.
        root: the rank to copy from.

    Raises:
        ValueError: there is no such rank, or an array is read-only.
        TypeError: `layer` is not a Layer.
        PeerError, CollectiveMismatchError: see above. Nothing is changed then.
    """
    broadcast_arrays(_state_arrays(layer), comm, root)


def broadcast_arrays(named: Named, comm: Any = None, root: int = 0) -> None:
    """:func:`broadcast_parameters` for arrays by name."""
    communicator = resolve(comm)
    with CollectiveCall(communicator, "broadcast_parameters", _SHORTEST) as call:
        if not isinstance(root, int | np.integer) or not 0 <= root < communicator.size:
            raise ValueError(f"root must be a rank from 0 to {communicator.size - 1}, got {root!r}")
        for name, array in named:
            check_writeable(name, array)
        _compare(call, {"root": root, "": outline(named)})
    if communicator.size == 1:
        return
    arrays = [array for _, array in named]
    words = [-(-array.nbytes // 4) for array in arrays]
    with CollectiveCall(communicator, "broadcast_parameters", padded_length(sum(words))) as call:
        # A sum of one rank's bits and the others' zeros, as integers: exact for every dtype.
        mine = communicator.rank == root
        total = _allreduce(call, [_words(a) for a in arrays] if mine else [np.zeros(sum(words))])
    # All at once, before any is written: they might not fit in memory.
    bits = cut(total.astype(np.uint32), words)
    octets = [b.view(np.uint8)[: a.nbytes] for b, a in zip(bits, arrays, strict=True)]
    assign_all(
        arrays, [o.view(a.dtype).reshape(a.shape) for o, a in zip(octets, arrays, strict=True)]
    )


def verify_sync(layer: Layer, comm: Any = None) -> None:
    """Checks that parameters and buffers have the same bits on every rank.

    Args:
        layer: the root of the tree.
        comm: as for SyncBatchNorm; None is ``MPI.COMM_WORLD``.

    Raises:
        CollectiveMismatchError: on every rank; names the first array that differs, or says how the
            trees differ.
        PeerError: another rank failed.
        TypeError: `layer` is not a Layer.
    """
    verify_arrays(_state_arrays(layer), comm)


def verify_arrays(named: Named, comm: Any = None) -> None:
    """:func:`verify_sync` for arrays by name."""
    communicator = resolve(comm)
    with CollectiveCall(communicator, "verify_sync", _SHORTEST) as call:
        _compare(call, {"": outline(named)})
    if communicator.size == 1:
        return
    length = padded_length(2 * _PIECES * len(named))
    with CollectiveCall(communicator, "verify_sync", length) as call:
        pieces = np.array([_hash_pieces(array) for _, array in named], np.float64).reshape(-1)
        sums = _allreduce(call, [pieces, pieces * pieces])
    total, squares = np.split(sums, 2)
    mean = total / communicator.size  # the same integer on all ranks: see statistics.words_of_all
    differs = (mean % 1 != 0) | (communicator.size * mean * mean != squares)
    differs = differs.reshape(-1, _PIECES).any(axis=1)
    names = [name for (name, _), differ in zip(named, differs, strict=True) if differ]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CollectiveMismatchError(
            f"{names[0]!r}{more} of {len(named)} arrays: the bits are not the same on all "
            f"{communicator.size} ranks"
        )


def split_comm(comm: Any, group_size: int) -> Any:
    """Splits the ranks into groups of `group_size` consecutive ones; the last may be smaller.

    Args:
        comm: an mpi4py communicator, an MpiCommunicator, or None for ``MPI.COMM_WORLD``; or a
            ThreadCommunicator.
        group_size: ranks in a group.

    Returns:
        This rank's group: an mpi4py communicator, which the caller may ``Free()``; of threads a
        ThreadCommunicator.

    Raises:
        ValueError: group_size is not an integer of at least 1; the other ranks raise PeerError.
        TypeError: comm is none of these.
        CollectiveMismatchError: the ranks have different group sizes.
    """
    communicator = resolve(comm)
    if not isinstance(communicator, MpiCommunicator | ThreadCommunicator):
        raise TypeError(f"comm must be a communicator of MPI or threads, got {type(comm).__name__}")
    with CollectiveCall(communicator, "split_comm", _SHORTEST) as call:
        if not isinstance(group_size, int | np.integer) or group_size < 1:
            raise ValueError(f"group_size must be an integer of at least 1, got {group_size!r}")
        _compare(call, {"group_size": int(group_size)})
    return communicator.split(communicator.rank // int(group_size))


def local_device() -> str:
    """The CUDA device for this rank, e.g. "cuda:1"; a machine's ranks take its devices in turn.

    Reads the launcher's variables, so it can be called before MPI is initialised.

    Raises:
        DeviceError: CuPy is not installed, or sees no device.
    """
    try:
        import cupy  # type: ignore[import-not-found, unused-ignore]

        devices = cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    except ImportError as error:
        raise DeviceError(
            "CUDA devices need CuPy: pip install cupy-cuda13x (or cupy-cuda12x)"
        ) from error
    if devices == 0:
        raise DeviceError("CuPy sees no CUDA device on this machine")
    return f"cuda:{local_rank() % devices}"


def _check_tree(layer: Any) -> None:
    if not isinstance(layer, Layer):
        raise TypeError(
            f"expected a Layer, got {type(layer).__name__}; for PyTorch modules there are "
            "functions of the same names in cupybn.interop.torch"
        )


def _compare(call: CollectiveCall, settings: dict[str, object]) -> None:
    """Raises CollectiveMismatchError on every rank unless all have the same settings."""
    call.agree(settings)
    if call.ranks > 1:
        call.payload(_HOST, 0)
        call.allreduce()


def _allreduce(call: CollectiveCall, parts: list[Array], beside: Array = _HOST) -> Array:
    """The sums of the parts over the ranks, in one message on the device of `beside`."""
    sizes = [part.size for part in parts]
    for place, part in zip(cut(call.payload(beside, sum(sizes)), sizes), parts, strict=True):
        assign(place, part.reshape(-1))
    return call.allreduce()[1]


def _state_arrays(layer: Layer) -> Named:
    _check_tree(layer)
    return [*layer.named_parameters(), *layer.named_buffers()]


def outline(named: Named) -> str:
    """A short text that is the same for the same names, shapes and dtypes in the same order."""
    text = "; ".join(f"{name} {array.shape} {array.dtype}" for name, array in named)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    values = sum(array.size for _, array in named)
    return f"{len(named)} arrays with {values} values (outline {digest})"


def _words(array: Array) -> Array:
    """The array's bytes as unsigned 32-bit words, zeros at the end; each in a float64."""
    data = copy_to_host(array).tobytes()
    data += bytes(-len(data) % 4)
    return np.frombuffer(data, np.uint32).astype(np.float64)


def _hash_pieces(array: Array) -> list[int]:
    digest = hashlib.blake2b(copy_to_host(array).tobytes(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    return [number >> (20 * i) & 0xFFFFF for i in range(_PIECES)]
