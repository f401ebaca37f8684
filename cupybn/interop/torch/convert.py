"""Turning the batch norms of a module into synchronised ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from ...layers.convert import recast, replace_norms
from ...layers.sync import CommReference
from .groups import check_comm
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_KNOWN = (*_OURS, *(getattr(torch.nn, cls.__name__) for cls in _OURS))
_STATE = ("_parameters", "_buffers", "_modules")


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
    comm = check_comm(comm)

    def synchronised(old: Any, path: str) -> SyncBatchNorm:
        if isinstance(old, SyncBatchNorm):
            old.comm = comm
            old.name = old.name or path or None
            return old
        changes = {"_comm": CommReference(comm), "name": path or None}
        new: SyncBatchNorm = recast(old, SyncBatchNorm, _STATE, changes)
        new.__dict__.pop("process_group", None)
        return new

    return replace_norms(
        dict(module.named_modules(remove_duplicate=False)),
        "_modules",
        _KNOWN,
        synchronised,
        skip,
        base=TorchBatchNorm,
        names=("part of the module", "the module"),
    )
