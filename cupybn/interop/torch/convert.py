"""Turning the batch norms of a module into synchronised ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...communicators import check_comm
from ...layers.sync import CommReference
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

_PLAIN = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_THEIRS = tuple(getattr(torch.nn, cls.__name__) for cls in (*_PLAIN, SyncBatchNorm))
_KNOWN = (*_PLAIN, SyncBatchNorm, *_THEIRS)


def convert_sync_batchnorm(module: Any, comm: Any = None, *, skip: Iterable[str] = ()) -> Any:
    """Every batch norm of a module, PyTorch's or this one's, as a SyncBatchNorm over `comm`.

    The new ones have the very same parameters, buffers, mode and hooks, and their path as their
    name; a shared one stays shared. What is returned is `module`, changed in place, or its
    successor if it is a batch norm itself. `comm` and `skip` are as for
    :func:`cupybn.convert_sync_batchnorm`.

    Raises:
        TypeError: a batch norm is of a subclass, whose own behaviour would be lost (a lazy one
            becomes a known one in its first forward); put its path into `skip`, or replace it
            yourself; or `module` is no module. Nothing was changed.
        ValueError: `skip` names a path that is not in the module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    check_comm(comm)
    paths = dict(module.named_modules(remove_duplicate=False))
    skip = {skip} if isinstance(skip, str) else set(skip)
    if unknown := sorted(skip - set(paths)):
        raise ValueError(f"skip names no part of the module: {', '.join(map(repr, unknown))}")
    kept = {id(paths[path]) for path in skip}
    olds = {
        path: part
        for path, part in paths.items()
        if isinstance(part, TorchBatchNorm) and id(part) not in kept
    }
    for path, part in olds.items():
        if type(part) not in _KNOWN:
            raise TypeError(
                f"{path or 'the module'!r} is a {type(part).__name__}, a subclass whose own "
                "behaviour would be lost; name its path in skip=, or replace it yourself"
            )
    new: dict[int, Any] = {}
    for path, part in olds.items():
        if id(part) not in new:
            new[id(part)] = _synchronised(part, comm, path or None)
    for parent in list({id(part): part for part in paths.values()}.values()):
        for name, child in list(parent._modules.items()):
            parent._modules[name] = new.get(id(child), child)
    return new.get(id(module), module)


def _synchronised(old: Any, comm: Any, path: str | None) -> SyncBatchNorm:
    if isinstance(old, SyncBatchNorm):
        old.comm = comm
        old.name = old.name or path
        return old
    module = SyncBatchNorm.__new__(SyncBatchNorm)
    module.__dict__.update(old.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        module.__dict__[kind] = old.__dict__[kind].copy()
    module.__dict__.pop("process_group", None)
    module.__dict__.update(_comm=CommReference(comm), name=path)
    return module
