"""The functions of ``cupybn.distributed`` for modules. `comm` is as for SyncBatchNorm."""

from __future__ import annotations

from typing import Any

import torch

from ... import distributed
from .groups import resolve
from .tensors import Tensor, array_of, on_stream_of


def _named(tensors: dict[str, Tensor]) -> distributed.Named:
    """The tensors as arrays over their memory."""
    return [(name, array_of(tensor, name)) for name, tensor in tensors.items()]


def _state(module: Any) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _first(module: Any) -> Tensor:
    return next(iter(module.parameters()), None)


def allreduce_gradients(module: Any, comm: Any = None, op: str = "mean") -> None:
    """Replaces every gradient of the module by its mean or sum over the ranks, in one message.

    It takes parameters that require grad; one without a gradient counts as zeros, and gets one.
    As :func:`cupybn.distributed.allreduce_gradients` otherwise.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()
    }
    with on_stream_of(_first(module)):
        distributed.allreduce_arrays(_named(gradients), resolve(comm), op)
    for name, gradient in gradients.items():
        parameters[name].grad = gradient


def broadcast_parameters(module: Any, comm: Any = None, root: int = 0) -> None:
    """Copies parameters and buffers of `module` on rank `root` to every rank, bit for bit.

    As :func:`cupybn.distributed.broadcast_parameters`.
    """
    tensors = _state(module)
    with on_stream_of(_first(module)):
        distributed.broadcast_arrays(_named(tensors), resolve(comm), root)
    for tensor in tensors.values():
        torch.autograd.graph.increment_version(tensor)


def verify_sync(module: Any, comm: Any = None) -> None:
    """Checks that parameters and buffers of `module` have the same bits on every rank.

    As :func:`cupybn.distributed.verify_sync`.
    """
    with on_stream_of(_first(module)):
        distributed.verify_arrays(_named(_state(module)), resolve(comm))
