"""Turning the batch norms of a tree into synchronised ones and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..communicators import SelfCommunicator, check_comm
from .base import Layer
from .batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import CommReference, SyncBatchNorm

_KNOWN = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)


def convert_sync_batchnorm(layer: Layer, comm: Any = None, *, skip: Iterable[str] = ()) -> Layer:
    """Every BatchNorm1d, 2d and 3d of the tree as a SyncBatchNorm over `comm`.

    The new layers have the very same parameter, gradient and buffer arrays and every option of the
    old ones; a layer that was shared stays shared. A SyncBatchNorm gets the new `comm`. Containers
    are changed in place: what is returned is `layer`, or its successor if it is a batch norm.

    Args:
        layer: the root of the tree.
        comm: as for SyncBatchNorm.
        skip: paths of layers to leave as they are.

    Raises:
        TypeError: a layer is of a subclass of a batch norm, whose own behaviour would be lost; put
            its path into `skip`, or convert it yourself. Nothing was changed.
        ValueError: `skip` names a path that is not in the tree.
    """
    check_comm(comm)

    def converted(old: BatchNorm) -> BatchNorm:
        if isinstance(old, SyncBatchNorm):
            old.comm = comm
            return old
        return _recast(
            old, SyncBatchNorm, name=None, _comm=CommReference(comm), _converted_from=type(old)
        )

    return _replace(layer, converted, skip)


def revert_sync_batchnorm(layer: Layer, *, skip: Iterable[str] = ()) -> Layer:
    """Every SyncBatchNorm of the tree as what it was converted from, arrays and options kept.

    One that was made directly stays a SyncBatchNorm, over ``SelfCommunicator()``. Otherwise as
    :func:`convert_sync_batchnorm`.
    """

    def reverted(old: BatchNorm) -> BatchNorm:
        if not isinstance(old, SyncBatchNorm):
            return old
        if old._converted_from is None:
            old.comm = SelfCommunicator()
            return old
        new = _recast(old, old._converted_from)
        for name in ("name", "_comm", "_converted_from"):
            del new.__dict__[name]
        return new

    return _replace(layer, reverted, skip)


def _recast(old: BatchNorm, cls: type[BatchNorm], **changes: Any) -> BatchNorm:
    new = cls.__new__(cls)
    state = old.__dict__ | changes
    for kind in ("params", "grads", "buffers", "children"):
        state[kind] = dict(state[kind])
    new.__setstate__(state)
    return new


def _replace(
    root: Layer, successor: Callable[[BatchNorm], BatchNorm], skip: Iterable[str]
) -> Layer:
    """The tree with each batch norm replaced by its successor; checks all of it first."""
    if not isinstance(root, Layer):
        raise TypeError(f"expected a Layer, got {type(root).__name__}")
    paths = dict(root._walk(""))
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(skip - set(paths)):
        raise ValueError(f"skip names no layer of the tree: {', '.join(map(repr, unknown))}")
    unique = {id(layer): layer for layer in paths.values()}
    kept = {id(paths[path]) for path in skip}
    norms = {
        key: layer
        for key, layer in unique.items()
        if isinstance(layer, BatchNorm) and key not in kept
    }
    for path, layer in paths.items():
        if id(layer) in norms and type(layer) not in _KNOWN:
            raise TypeError(
                f"{path or 'the root'!r} is a {type(layer).__name__}, a subclass whose own "
                "behaviour would be lost; name its path in skip=, or replace it yourself"
            )
    successors = {key: successor(norm) for key, norm in norms.items()}
    for parent in unique.values():
        for name, child in parent.children.items():
            parent.children[name] = successors.get(id(child), child)
    return successors.get(id(root), root)
