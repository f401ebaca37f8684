"""Turning the batch norms of a module into synchronised ones and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.modules.batchnorm import _LazyNormBase

from ...collective import CollectiveCall
from ...communicators import SelfCommunicator
from ...forward_backward import call_name
from ...layers.convert import recast, replace_norms
from ...layers.sync import CommReference
from ...statistics import message_length
from .groups import check_comm
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """A lazy batch norm that was converted; a SyncBatchNorm from its first forward on."""

    cls_to_become = SyncBatchNorm
    num_features: int

    def initialize_parameters(self, input: Any) -> None:
        length = message_length(self.num_features)
        with CollectiveCall(self.communicator(), call_name("forward", self.label), length):
            if not isinstance(input, torch.Tensor):
                raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
            self._check_input_dim(input)
            super().initialize_parameters(input)
            # PyTorch leaves it at 0 if there is nothing to initialise.
            known = self.running_mean if self.weight is None else self.weight
            self.num_features = input.shape[1] if known is None else known.numel()


_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_LAZY = tuple(getattr(torch.nn, f"LazyBatchNorm{n}d") for n in (1, 2, 3))
_KNOWN = (*_OURS, *(getattr(torch.nn, cls.__name__) for cls in _OURS), *_LAZY, LazySyncBatchNorm)
_STATE = ("_parameters", "_buffers", "_modules")


def convert_sync_batchnorm(module: Any, comm: Any = None, *, skip: Iterable[str] = ()) -> Any:
    """Replaces every batch norm of a module, PyTorch's or this one's, by a SyncBatchNorm.

    The new ones have the same parameters, buffers, mode and hooks, and their path as their name; a
    shared one stays shared. A lazy one becomes a SyncBatchNorm in its first forward. Returns
    `module`, changed in place, or its successor if it is a batch norm itself. `comm` is as for
    :class:`SyncBatchNorm`, `skip` as for :func:`cupybn.convert_sync_batchnorm`.

    Raises:
        TypeError: a batch norm is of a subclass, whose own behaviour would be lost; put its path
            into `skip`, or replace it yourself; or `module` is not a module. Nothing was changed.
        ValueError: `skip` names a path that is not in the module.
    """
    comm = check_comm(comm)

    def synchronised(old: Any, path: str) -> Any:
        if isinstance(old, SyncBatchNorm):
            old.comm = comm
            old.name = old.name or path or None
            return old
        changes = {"_comm": CommReference(comm), "name": path or None, "_was": _origin(old)}
        if isinstance(old, _LAZY):  # its hooks are methods of it, so it stays the same object
            old.__class__ = LazySyncBatchNorm
            old.__dict__.update(changes)
            return old
        new: SyncBatchNorm = recast(old, SyncBatchNorm, _STATE, changes)
        new.__dict__.pop("process_group", None)
        return new

    return _replace(module, synchronised, skip)


def revert_sync_batchnorm(module: Any, *, skip: Iterable[str] = ()) -> Any:
    """Replaces every SyncBatchNorm of this package in a module by what it was converted from.

    It gets its class back, which checks its input's dimensions again, and keeps the parameters,
    buffers, mode and hooks that it has now. One that was made directly stays a SyncBatchNorm, over
    ``SelfCommunicator()``; one that was ``torch.nn.SyncBatchNorm`` gets its process group back, if
    it was not pickled in between. Otherwise as :func:`convert_sync_batchnorm`.
    """

    def reverted(old: Any, path: str) -> Any:
        if not isinstance(old, SyncBatchNorm):
            return old
        cls, group = old._was or (None, None)
        if cls is None:
            old.comm = SelfCommunicator()
            return old
        if isinstance(old, LazySyncBatchNorm):
            old.__class__, new = cls, old
        else:
            new = recast(old, getattr(cls, "cls_to_become", cls), _STATE, {})
        for name in ("name", "_comm", "_was", "_bindings"):
            new.__dict__.pop(name, None)
        if group is not None:
            new.process_group = group.comm
        return new

    return _replace(module, reverted, skip)


def _origin(norm: Any) -> tuple[type, CommReference | None]:
    """The class of a batch norm, and the process group if it is ``torch.nn.SyncBatchNorm``."""
    own = isinstance(norm, torch.nn.SyncBatchNorm)
    return type(norm), CommReference(norm.process_group) if own else None


def _replace(module: Any, successor: Any, skip: Iterable[str]) -> Any:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    return replace_norms(
        dict(module.named_modules(remove_duplicate=False)),
        "_modules",
        _KNOWN,
        successor,
        skip,
        base=TorchBatchNorm,
        names=("part of the module", "the module"),
    )
