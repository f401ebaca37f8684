"""``recalibrate`` and ``fold`` for modules, as ``cupybn.recalibrate`` and ``cupybn.fold``."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
from torch.nn.parameter import is_lazy

from ... import calibration
from ...communicators import Communicator, SelfCommunicator
from ...errors import DTypeError
from ...statistics import Moments
from .groups import resolve
from .modules import SyncBatchNorm
from .tensors import Tensor, check_mask


class _Observer:
    """A forward pre-hook of a batch norm module that is recalibrated."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.num_features = norm.num_features
        self.observed = Moments(0, np.zeros(self.num_features), np.zeros(self.num_features))

    def communicator(self) -> Communicator:
        own = isinstance(self.norm, SyncBatchNorm)
        return self.norm.communicator() if own else SelfCommunicator()

    def __call__(self, norm: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Merges the moments of an input (N, C, ...), in float64; ignores other inputs."""
        given = dict(zip(("input", "mask"), args, strict=False)) | named
        x, mask = given.get("input"), given.get("mask")
        if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[1] == self.num_features:
            if mask is not None:
                check_mask(mask, x)
            x = x.detach().double().movedim(1, 0).flatten(1)
            x = x if mask is None else x[:, mask.flatten() != 0]
            if x.shape[1]:
                mean = x.mean(1)
                m2 = (x - mean[:, None]).square().sum(1)
                moments = Moments(x.shape[1], mean.cpu().numpy(), m2.cpu().numpy())
                self.observed = self.observed.merge(moments)


class _Modules:
    """A module whose batch norms are recalibrated."""

    def __init__(self, module: Any, norms: calibration.Norms) -> None:
        self.module, self.norms = module, norms
        self.synchronised = any(isinstance(each.norm, SyncBatchNorm) for _, each in norms)
        self.device = norms[0][1].norm.running_mean.device

    def take(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            raise DTypeError(f"an input must be a torch.Tensor, got {type(x).__name__}")
        return x

    def run(self, x: Any, mask: Any = None) -> object:
        return self.module(self.take(x), **({} if mask is None else {"mask": mask}))

    def empty(self, dtype: str, shape: tuple[int, ...]) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def check(self) -> None:
        """Statistics of a module can always be written, or this raises before anything is."""
        for path, each in self.norms:
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                tensor = getattr(each.norm, name)
                if tensor is not None and tensor.is_inference():
                    raise RuntimeError(
                        f"{path}.{name} was made in inference mode and cannot be updated: set it "
                        "to its clone()"
                    )


class _Uncompiled:
    """A context in which compiled modules run uncompiled, since they do not call new hooks.

    The switch belongs to the process: the first thread in turns it, the last one turns it back.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.stance = torch.compiler.set_stance("force_eager")
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()


@contextmanager
def _observed(module: Any, observers: list[_Observer]) -> Iterator[None]:
    """The observers' norms in training mode, updating nothing; all else in evaluation mode."""
    modes = [(each, each.training) for each in module.modules()]
    tracking = [each.norm.track_running_stats for each in observers]
    handles = []
    try:
        module.eval()
        for each in observers:
            handles.append(each.norm.register_forward_pre_hook(each, with_kwargs=True))
            each.norm.training, each.norm.track_running_stats = True, False
        with torch.no_grad(), _uncompiled:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for each, tracks in zip(observers, tracking, strict=True):
            each.norm.track_running_stats = tracks
        module.train(module.training)  # for modules whose train() does more than set it
        for part, mode in modes:
            part.training = mode


def recalibrate(
    module: Any, batches: Iterable[Any], comm: Any = None, *, masked: bool = False
) -> None:
    """Sets the running statistics of every batch norm of a module to those of a data set.

    It takes those of this package and of ``torch.nn``, also ``torch.nn.SyncBatchNorm``, which sends
    its own messages. Results, ranks and errors are as for :func:`cupybn.recalibrate`; `batches` are
    tensors, or tuples or lists that begin with one, on
    the module's device, `comm` is as for :class:`SyncBatchNorm`. With `masked` they are pairs of
    tensors (x, mask), and the module is called with ``mask=mask``. Nothing is recorded for
    autograd, and compiled modules run uncompiled. ``torch.optim.swa_utils.update_bn`` averages the
    batches' statistics instead, each process for itself.

    Raises:
        ValueError: a lazy batch norm has not seen an input; and as :func:`cupybn.recalibrate`.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    communicator = resolve(comm)
    norms = [
        (path, _Observer(each))
        for path, each in module.named_modules()
        if isinstance(each, TorchBatchNorm) and each.running_mean is not None
    ]
    if lazy := [path for path, each in norms if is_lazy(each.norm.running_mean)]:
        raise ValueError(f"{lazy[0]!r} is lazy: run a forward of the module first")
    if not norms:
        return
    with _observed(module, [each for _, each in norms]):
        modules = _Modules(module, norms)
        number, moments = calibration.statistics(modules, batches, communicator, masked)
    with torch.no_grad():
        for (_, each), (count, mean, m2) in zip(norms, moments, strict=True):
            if count:
                each.norm.running_mean.copy_(torch.from_numpy(mean))
                each.norm.running_var.copy_(torch.from_numpy(m2 / max(count - 1, 1)))
            if each.norm.num_batches_tracked is not None:
                each.norm.num_batches_tracked.fill_(number)


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold(module: Any) -> tuple[Tensor, Tensor]:
    """The scale and shift, (C,) each, of a batch norm module in evaluation mode.

    The module is one of this package or of ``torch.nn``. New tensors, as :func:`cupybn.fold`
    computes them.

    Raises:
        TypeError: module is not a batch norm.
        ValueError: it has no running statistics.
    """
    if not isinstance(module, TorchBatchNorm):
        raise TypeError(f"fold takes a batch norm, got {type(module).__name__}")
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        raise ValueError("made with track_running_stats=False, there are no statistics to fold")
    scale = (var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    return scale.to(mean.dtype), shift.to(mean.dtype)
