"""What is compared on a GPU, each without autograd: cupybn, and what PyTorch has.

PyTorch's own kernels (native), cuDNN, and the kernels of its SyncBatchNorm (sync), which a world of
size one does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ...communicators import SelfCommunicator
from ...layers import SyncBatchNorm
from .cases import EPS, MOMENTUM, Case, Tensors

PATHS = ("cupybn", "native", "cudnn", "sync")


class Implementation(NamedTuple):
    """``kept = forward(tensors)``, then ``backward(tensors, kept)``; PyTorch's return tuples."""

    forward: Callable[[Tensors], Any]
    backward: Callable[[Tensors, Any], Any]


def implementations(torch: Any, case: Case, device: str) -> dict[str, Implementation]:
    """By name, PyTorch's only where there is one."""
    layer = SyncBatchNorm(
        case.shape[1], EPS, MOMENTUM, comm=SelfCommunicator(), device=device,
        dtype="float64" if case.dtype == "float64" else "float32",
    )  # fmt: skip
    found = {
        "cupybn": Implementation(
            lambda t: layer.forward(t.x), lambda t, y: layer.backward(t.dy)
        )
    }  # fmt: skip
    return found if torch is None else found | _of_torch(torch, case, device)


def _of_torch(torch: Any, case: Case, device: str) -> dict[str, Implementation]:
    aten, c = torch.ops.aten, case.shape[1]
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    weight, bias, mean, var = (
        make(c, device=device, dtype=dtype)
        for make in (torch.ones, torch.zeros, torch.zeros, torch.ones)
    )
    count = torch.tensor([math.prod(case.shape) // c], dtype=torch.int32, device=device)
    counts = count.to(dtype)

    def native(t: Tensors) -> Any:
        return aten.native_batch_norm(t.tx, weight, bias, mean, var, True, MOMENTUM, EPS)

    def native_backward(t: Tensors, kept: Any) -> Any:
        return aten.native_batch_norm_backward(
            t.tdy, t.tx, weight, mean, var, kept[1], kept[2], True, EPS, [True, True, True]
        )

    def cudnn(t: Tensors) -> Any:
        return aten.cudnn_batch_norm(t.tx, weight, bias, mean, var, True, MOMENTUM, EPS)

    def cudnn_backward(t: Tensors, kept: Any) -> Any:
        _, save_mean, save_var, reserve = kept
        return aten.cudnn_batch_norm_backward(
            t.tx, t.tdy, weight, mean, var, save_mean, save_var, EPS, reserve
        )

    def sync(t: Tensors) -> Any:
        mean1, invstd1 = aten.batch_norm_stats(t.tx, EPS)
        pooled = aten.batch_norm_gather_stats_with_counts(
            t.tx, mean1[None], invstd1[None], mean, var, MOMENTUM, EPS, counts
        )
        return aten.batch_norm_elemt(t.tx, weight, bias, *pooled, EPS), *pooled

    def sync_backward(t: Tensors, kept: Any) -> Any:
        _, mean1, invstd1 = kept
        sum_dy, sum_dy_xmu, dweight, dbias = aten.batch_norm_backward_reduce(
            t.tdy, t.tx, mean1, invstd1, weight, True, True, True
        )
        dx = aten.batch_norm_backward_elemt(
            t.tdy, t.tx, mean1, invstd1, weight, sum_dy, sum_dy_xmu, count
        )
        return dx, dweight, dbias

    return {
        "native": Implementation(native, native_backward),
        "cudnn": Implementation(cudnn, cudnn_backward),
        "sync": Implementation(sync, sync_backward),
    }
