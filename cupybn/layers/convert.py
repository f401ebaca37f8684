"""Turning the batch norms of a tree into synchronised ones and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..communicators import SelfCommunicator, check_comm
from .base import Layer
from .batchnorm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .sync import CommReference, SyncBatchNorm

_KNOWN = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_STATE = ("params", "grads", "buffers", "children")


def convert_sync_batchnorm(layer: Layer, comm: Any = None, *, skip: Iterable[str] = ()) -> Layer:
    """Replaces every BatchNorm1d, 2d and 3d of the tree by a SyncBatchNorm over `comm`.

    The new layers have the same parameter, gradient and buffer arrays and every option of the
    old ones; a layer that was shared stays shared. A SyncBatchNorm gets the new `comm`. Containers
    are changed in place. Returns `layer`, or its successor if it is a batch norm.

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

    def converted(old: BatchNorm, path: str) -> Any:
        if isinstance(old, SyncBatchNorm):
            old.comm = comm
            return old
        return recast(
            old,
            SyncBatchNorm,
            _STATE,
            {"name": None, "_comm": CommReference(comm), "_converted_from": type(old)},
        )

    return _replace(layer, converted, skip)


def revert_sync_batchnorm(layer: Layer, *, skip: Iterable[str] = ()) -> Layer:
    """Replaces every SyncBatchNorm of the tree by what it was converted from; arrays stay.

    One that was made directly stays a SyncBatchNorm, over ``SelfCommunicator()``. Arguments,
    result and errors are those of :func:`convert_sync_batchnorm`.
    """

    def reverted(old: BatchNorm, path: str) -> BatchNorm:
        if not isinstance(old, SyncBatchNorm):
            return old
        if old._converted_from is None:
            old.comm = SelfCommunicator()
            return old
        new: BatchNorm = recast(old, old._converted_from, _STATE, {})
        for name in ("name", "_comm", "_converted_from"):
            del new.__dict__[name]
        return new

    return _replace(layer, reverted, skip)


def recast(old: Any, cls: Any, kinds: tuple[str, ...], changes: dict[str, Any]) -> Any:
    """The state of a layer or module as one of another class; dicts of these `kinds` are copied."""
    new = cls.__new__(cls)
    state = old.__dict__ | changes
    for kind in kinds:
        state[kind] = state[kind].copy()
    new.__setstate__(state)
    return new


def _replace(
    root: Layer, successor: Callable[[BatchNorm, str], BatchNorm], skip: Iterable[str]
) -> Layer:
    if not isinstance(root, Layer):
        raise TypeError(f"expected a Layer, got {type(root).__name__}")
    replaced: Layer = replace_norms(
        dict(root._walk("")),
        "children",
        _KNOWN,
        successor,
        skip,
        base=BatchNorm,
        names=("layer of the tree", "the root"),
    )
    return replaced


def replace_norms(
    paths: dict[str, Any],
    children: str,
    known: tuple[type, ...],
    successor: Callable[[Any, str], Any],
    skip: Iterable[str],
    *,
    base: type,
    names: tuple[str, str],
) -> Any:
    """The root of a tree with each batch norm replaced by its successor; checks all of it first.

    Args:
        paths: every layer or module by its path, the root first, a shared one once a path.
        children: the attribute with the dict of a part's children.
        known: the library's own classes of batch norms; `base` is the base of all.
        successor: takes a batch norm and its first path.
        skip: paths to leave as they are.
        names: what errors call a part, and the root.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(skip - set(paths)):
        raise ValueError(f"skip names no {names[0]}: {', '.join(map(repr, unknown))}")
    kept = {id(paths[path]) for path in skip}
    norms = {
        path: part
        for path, part in paths.items()
        if isinstance(part, base) and id(part) not in kept
    }
    for path, norm in norms.items():
        if type(norm) not in known:
            raise TypeError(
                f"{path or names[1]!r} is a {type(norm).__name__}, a subclass whose own "
                "behaviour would be lost; name its path in skip=, or replace it yourself"
            )
    first = {id(norms[path]): path for path in reversed(norms)}  # the first path is set last
    successors = {key: successor(norms[path], path) for key, path in first.items()}
    for part in paths.values():
        parts = getattr(part, children)
        for name, child in parts.items():
            parts[name] = successors.get(id(child), child)
    root = paths[""]
    return successors.get(id(root), root)
