"""Running statistics from a data set, and batch norms as a scale and a shift."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np

from . import typing
from .arrays import as_array, assign, copy_to_host, cut, dtype_named, move, on_device_of
from .checks import check_writeable
from .collective import CollectiveCall
from .communicators import Communicator, resolve
from .layers import Layer, SyncBatchNorm
from .layers.batchnorm import BatchNorm
from .statistics import Moments, pack_texts, padded_length, unpack_texts

Norms: TypeAlias = "list[tuple[str, Any]]"
"""Batch norms with their paths; see :class:`Tree`."""

_Input: TypeAlias = "tuple[Any, ...]"  # x, a mask if any, whether it is this rank's own

_TEXT = 256  # characters that describe a batch
_HOST = np.zeros(0)


class Tree(Protocol):
    """A tree to recalibrate. `norms` have ``num_features``, ``observed``, ``communicator()``."""

    norms: Norms
    synchronised: bool

    def take(self, x: Any) -> Any:
        """An input in the form that the tree takes, which can be sliced."""

    @property
    def run(self) -> Callable[..., object]:
        """Forward with x, or x and a mask; norms merge their inputs into ``observed``."""

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """An input without samples."""

    def check(self) -> None:
        """Raises if running statistics cannot be written."""


class _Layers:
    """A tree of layers."""

    def __init__(self, layer: Layer, norms: Norms) -> None:
        self.layer, self.norms = layer, norms
        self.synchronised = any(isinstance(norm, SyncBatchNorm) for _, norm in norms)

    def take(self, x: Any) -> Any:
        return as_array(x)

    def run(self, x: Any, mask: Any = None) -> object:
        options = {} if mask is None else {"mask": mask}
        return self.layer.forward(x, save_for_backward=False, **options)

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        return move(np.empty(shape, dtype_named(dtype)), self.norms[0][1].device)

    def check(self) -> None:
        for path, norm in self.norms:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                check_writeable(f"{path}.{name}" if path else name, norm.buffers[name])


_QUIET = partial(np.errstate, all="ignore")  # NaN and Inf are ordinary results, as in the layers


def recalibrate(
    layer: Layer, batches: Iterable[Any], comm: Any = None, *, masked: bool = False
) -> None:
    """Sets the running statistics of every batch norm of the tree to those of a data set.

    Each batch goes forward through the tree, once. Batch norms normalise it as in training, with
    the statistics of the batch (of all ranks' batches where they are synchronised); all other
    layers are in evaluation mode. The running mean and variance become the mean and the unbiased
    variance of all inputs of the batch norm, on all ranks together: counts, means and m2 are merged
    exactly, nothing is averaged, and batches may have any sizes. A batch norm behind another one
    gets that one's output for each batch, so large batches are better.
    ``num_batches_tracked`` becomes the number of batches of all ranks. Weights stay as they are.

    Ranks may have different numbers of batches, or none. With synchronised layers a rank without
    further batches takes part with empty ones, which the other layers of the tree must accept.

    After any exception, also of a layer or of `batches`, nothing has changed on any rank: neither
    the statistics nor the mode of a layer.

    Args:
        layer: the root of the tree, the same on all ranks. Batch norms without running statistics
            are evaluated, and left alone.
        batches: this rank's inputs; of a tuple or list the first entry is the input. Iterated over
            once, so it may be a generator, or one wrapped in a progress bar.
        comm: of the ranks that share the data set; None is ``MPI.COMM_WORLD``. Synchronised layers
            must not have more ranks.
        masked: each batch is a pair (x, mask), and the tree is called with ``mask=mask``; a mask
            may be None. Else the second entry of a tuple may be a target, and is ignored.

    Raises:
        ValueError: there is no batch on any rank; a layer is synchronised over more ranks than
            `comm` has; or a running statistic is read-only.
        TypeError: `layer` is not a Layer; or a batch is not a pair, with `masked`.
        PeerError: another rank failed, in a batch norm or in its `batches`; without synchronised
            layers, anywhere. An exception in other code on one rank leaves the others waiting in
            the next synchronised layer, as in training.
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"expected a Layer, got {type(layer).__name__}")
    communicator = resolve(comm)
    norms = [
        (path, norm)
        for path, norm in layer.named_layers()
        if isinstance(norm, BatchNorm) and "running_mean" in norm.buffers
    ]
    if not norms:
        return
    with _observed(layer, [norm for _, norm in norms]):
        number, moments = statistics(_Layers(layer, norms), batches, communicator, masked)
    for (_, norm), (count, mean, m2) in zip(norms, moments, strict=True):
        if count:
            with _QUIET():
                assign(norm.running_mean, mean)
                assign(norm.running_var, m2 / max(count - 1, 1))
            norm.num_batches_tracked[...] = number


def statistics(
    tree: Tree, batches: Iterable[Any], comm: Communicator, masked: bool = False
) -> tuple[int, list[Moments]]:
    """The number of batches, and the moments of each batch norm's inputs, over all ranks."""
    reach = max(norm.communicator().size for _, norm in tree.norms)
    if reach > comm.size:
        raise ValueError(
            f"a layer is synchronised over {reach} ranks, but comm has {comm.size}: "
            "pass the communicator of all of them"
        )
    number, inputs = 0, _inputs(batches, masked)
    # Decided by the tree alone, which all ranks share: a rank may be the only one of its group.
    if comm.size > 1 and tree.synchronised:
        number, inputs = _run(tree, _in_step(tree, inputs, comm)), iter(())
    # Without synchronised layers this is the first message, and tells of any failure.
    length = padded_length(len(tree.norms) + sum(norm.num_features for _, norm in tree.norms))
    with CollectiveCall(comm, "recalibrate", length) as call:
        number += _run(tree, inputs)
        tree.check()
        call.agree({"": _outline(tree.norms)}, messages=2)
        with _QUIET():
            number, moments = _allreduce(call, number, [norm.observed for _, norm in tree.norms])
        if number == 0:
            raise ValueError(
                "there are no batches on any rank; an iterator that was used up before?"
            )
    return number, moments


def fold(layer: BatchNorm) -> tuple[typing.Array, typing.Array]:
    """The scale and shift, (C,) each, of a batch norm in evaluation mode.

    Before residual and activation y is ``scale * x + shift``, with
    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale``, computed
    in float64, in the dtype and on the device of the layer's statistics. A convolution or linear
    map before it takes them in as ``weight * scale`` per output channel and ``bias * scale +
    shift``.

    Raises:
        TypeError: layer is not a batch norm.
        ValueError: it has no running statistics.
    """
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"fold takes a batch norm, got {type(layer).__name__}")
    mean, var = layer.running_mean, layer.running_var
    if mean is None:
        raise ValueError(
            f"{layer.label}: made with track_running_stats=False, there are no statistics to fold"
        )
    with on_device_of(mean), _QUIET():
        scale = 1.0 / np.sqrt(var.astype(np.float64) + layer.eps)
        if layer.weight is not None:
            scale = scale * layer.weight
        shift = -mean * scale
        if layer.bias is not None:
            shift = shift + layer.bias
        return scale.astype(mean.dtype), shift.astype(mean.dtype)


def _outline(norms: Norms) -> str:
    """A text of the tree, equal only for equal trees; the other ranks see its beginning."""
    names = ", ".join(f"{path!r}: {norm.num_features} channels" for path, norm in norms)
    digest = hashlib.blake2b(names.encode(), digest_size=8).hexdigest()
    return f"{len(norms)} batch norms (outline {digest}), {names}"


@contextmanager
def _observed(layer: Layer, norms: list[BatchNorm]) -> Iterator[None]:
    """A context: `norms` train and merge the moments of their batches, all else evaluates."""
    modes = [(each, each.training) for _, each in layer.named_layers()]
    try:
        layer.eval()
        for norm in norms:
            norm.observed = Moments(0, np.zeros(norm.num_features), np.zeros(norm.num_features))
            norm.training = True
        yield
    finally:
        for norm in norms:
            norm.observed = None
        for each, mode in modes:
            each.training = mode


def _run(tree: Tree, inputs: Iterable[_Input]) -> int:
    """Forward with each input; returns how many were this rank's own."""
    number = 0
    for *arrays, own in inputs:
        tree.run(*arrays)
        number += own
    return number


def _inputs(batches: Iterable[Any], masked: bool) -> Iterator[_Input]:
    for batch in batches:
        several = isinstance(batch, tuple | list)
        if masked and not (several and len(batch) == 2):
            raise TypeError("masked=True wants batches that are pairs (x, mask)")
        if masked and batch[1] is not None:
            yield *batch, True
        else:
            yield batch[0] if several else batch, True


def _in_step(tree: Tree, inputs: Iterator[_Input], comm: Communicator) -> Iterator[_Input]:
    """This rank's inputs, then empty ones like them until no rank has more.

    One message before each, and a second while a rank has not seen a batch and its shape.
    """
    like: Any = None
    length = padded_length(max(comm.size + 1, _TEXT))
    while True:
        with CollectiveCall(comm, "a step of recalibrate", length) as call:
            x, *mask, own = next(inputs, (None, False))
            if own:
                x = tree.take(x)
                like = x[:0]
            presence = call.payload(_HOST, comm.size + 1)
            presence[comm.rank], presence[-1] = own, like is None
            _, total = call.allreduce()
            having = np.flatnonzero(total[:-1])
            if having.size == 0:
                return
            if total[-1]:
                call.messages = 1
                text = call.payload(_HOST, _TEXT)
                if comm.rank == having[0]:
                    words = [str(like.dtype).rpartition(".")[2], *map(str, like.shape)]
                    text[...] = pack_texts(" ".join(words), 0, 1, _TEXT)
                name, *shape = unpack_texts(call.allreduce()[1], 1)[0].split()
                if like is None:
                    like = tree.empty(name, tuple(map(int, shape)))
        yield (x, *mask, True) if own else (like, False)


def _allreduce(call: CollectiveCall, number: int, local: list[Any]) -> tuple[int, list[Moments]]:
    """Sums of `number` and merged moments, over the ranks: the means first, then m2 about them."""
    local = [Moments(m.count, copy_to_host(m.mean), copy_to_host(m.m2)) for m in local]
    if call.ranks == 1:
        return number, local
    sizes = [len(local), *(m.mean.size for m in local)]
    payload = call.payload(_HOST, sum(sizes))
    payload[...] = np.concatenate([[m.count for m in local], *(m.count * m.mean for m in local)])
    number, total = call.allreduce(number)
    counts, *weighted = cut(total.copy(), sizes)
    means = [w / max(n, 1.0) for w, n in zip(weighted, counts, strict=True)]
    payload = call.payload(_HOST, sum(sizes[1:]))
    payload[...] = np.concatenate(
        [m.m2 + m.count * (m.mean - mean) ** 2 for m, mean in zip(local, means, strict=True)]
    )
    m2s = cut(call.allreduce()[1], sizes[1:])
    return number, list(map(Moments, map(int, counts), means, m2s))
