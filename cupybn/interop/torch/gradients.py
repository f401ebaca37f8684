"""What ``cupybn.distributed`` does for layers, for modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from ... import distributed
from ...arrays import Array
from .autograd import Tensor, array_of, on_stream_of


class _Arrays:
    """A module's tensors as arrays over their memory: what ``distributed`` asks of a tree."""

    def __init__(self, module: Any) -> None:
        self.parameters = dict(module.named_parameters())
        self.buffers = dict(module.named_buffers())
        self.gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.parameters.items()
            if p.requires_grad
        }

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        return self._arrays(self.parameters)

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        return self._arrays(self.buffers)

    def named_gradients(self) -> Iterator[tuple[str, Array]]:
        return self._arrays(self.gradients)

    def _arrays(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Array]]:
        for name, tensor in tensors.items():
            yield name, array_of(tensor, name)


def _pooled(module: Any, function: Callable[..., None], *args: Any) -> _Arrays:
    arrays = _Arrays(module)
    with on_stream_of(next(iter(arrays.parameters.values()), None)):
        function(cast(Any, arrays), *args)
    return arrays


def allreduce_gradients(module: Any, comm: Any = None, op: str = "mean") -> None:
    """Replaces every gradient of the module by its mean or sum over the ranks, in one message.

    For parameters that require grad; one without a gradient counts as zeros, and gets one. As
    :func:`cupybn.distributed.allreduce_gradients` otherwise.
    """
    arrays = _pooled(module, distributed.allreduce_gradients, comm, op)
    for name, gradient in arrays.gradients.items():
        arrays.parameters[name].grad = gradient


def broadcast_parameters(module: Any, comm: Any = None, root: int = 0) -> None:
    """Copies parameters and buffers of rank `root` to every rank, bit for bit.

    As :func:`cupybn.distributed.broadcast_parameters`.
    """
    arrays = _pooled(module, distributed.broadcast_parameters, comm, root)
    for tensor in (*arrays.parameters.values(), *arrays.buffers.values()):
        torch.autograd.graph.increment_version(tensor)


def verify_sync(module: Any, comm: Any = None) -> None:
    """Checks that parameters and buffers have the same bits on every rank.

    As :func:`cupybn.distributed.verify_sync`.
    """
    _pooled(module, distributed.verify_sync, comm)
