"""Batch norm of one rank as operators that PyTorch's compilers, tracers and modes know.

``cupybn::batch_norm``, ``batch_norm_backward`` and ``batch_norm_double_backward`` are functional:
new running statistics come back, and the module copies them into its buffers. They do not
communicate: what records them may leave them out, repeat them and change their order.
"""

from __future__ import annotations

from typing import Any

import torch

from ...arrays import array_of_tensor
from ...collective import CollectiveCall
from ...forward_backward import ALONE, Bindings, Bound, Options, Saved, bind, running_factor
from .passes import run_backward, run_double_backward, run_forward
from .tensors import Tensor, on_stream_of

_bindings = Bindings(256)


def _bound(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, factor: float | None = None
) -> Bound:
    affine = weight is not None, bias is not None
    key = (x.shape, x.stride(), x.dtype, x.device, affine, eps, factor)
    bound: Bound | None = _bindings.get(key)
    if bound is None:
        options = Options(eps, affine=affine, save=False, factor=factor)
        bound = bind(array_of_tensor(x), 1, options, ALONE, "")
        _bindings.keep(key, bound)
    return bound


def _saved(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, statistics: Tensor, eps: float
) -> Saved:
    """The context of a forward, without arrays like x."""
    bound = _bound(x, weight, bias, eps)
    mean, invstd = array_of_tensor(statistics)
    count = bound.count if mask is None else int(mask.count_nonzero())
    return Saved(bound, None, None, None, mean, invstd, count)


def _new_like(x: Tensor) -> Tensor:
    """A new tensor in the memory order that a bound call gives a y and a dx: see Layout."""
    if x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        channels, *spatial = x.shape[1:]
        strides: list[int] = []
        step = channels
        for size in reversed(spatial):
            strides.insert(0, step)
            step = step * size
        return x.new_empty_strided(x.shape, (step, 1, *strides))
    return x.new_empty(x.shape)


def _or_nothing(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor in the place of None, which operators cannot return."""
    return x.new_empty(0) if tensor is None else tensor


def _empty_like(tensor: Tensor, x: Tensor) -> Tensor:
    return _or_nothing(None if tensor is None else torch.empty_like(tensor), x)


def _run_forward(x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """(y, statistics, new running mean, new running variance, new counter).

    `others` are running mean, running variance, counter, momentum, eps, and a mask if there is one;
    the dispatcher leaves out what is a default. The statistics are (2, C) float64: mean and invstd.
    In place of None, empty tensors come back.
    """
    *buffers, momentum, eps, mask = (*others, None)[:6]
    new = [None if buffer is None else buffer.clone() for buffer in buffers]
    factor = None
    if buffers[0] is not None:
        counts = momentum is not None or buffers[2] is not None
        factor = running_factor(momentum, buffers[2]) if counts else 0.0
    with on_stream_of(x):
        bound = _bound(x, weight, bias, eps, factor)
        y, saved = run_forward(None, bound, x, array_of_tensor(x), (weight, bias, *new), mask, True)
        statistics = x.new_empty((2, bound.channels), dtype=torch.float64)
        array = array_of_tensor(statistics)
        array[0], array[1] = saved.mean, saved.invstd
    return (y, statistics, *(_or_nothing(tensor, x) for tensor in new))


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
    statistics = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    return (_new_like(x), statistics, *(_empty_like(buffer, x) for buffer in others[:3]))


def _run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    eps: float,
    mask: Tensor = None,
) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias); in place of None, empty tensors come back."""
    with on_stream_of(x):
        saved = _saved(x, weight, bias, mask, statistics, eps)
        gradients = run_backward(None, saved, dy, x, weight, bias, mask)
    return tuple(_or_nothing(tensor, x) for tensor in gradients)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    eps: float,
    mask: Tensor = None,
) -> tuple[Tensor, ...]:
    return _new_like(x), _empty_like(weight, x), _empty_like(bias, x)


def _run_double_backward(
    ddx: Tensor,
    ddweight: Tensor,
    ddbias: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    """(ddy, dx, dweight); in place of None, an empty tensor comes back."""
    eps, mask = (*others, None)[:2]
    with on_stream_of(x):
        saved = _saved(x, weight, ddbias, mask, statistics, eps)  # a bias has a gradient
        call = CollectiveCall(ALONE, "double backward of a batch norm", 0)
        gradients = run_double_backward(
            call, saved, (ddx, ddweight, ddbias), (dy, x, weight, ddbias, mask)
        )
    return tuple(_or_nothing(tensor, x) for tensor in gradients)


def _fake_double_backward(
    ddx: Tensor,
    ddweight: Tensor,
    ddbias: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    return _new_like(x), _new_like(x), _empty_like(weight, x)


# ---- derivatives ---------------------------------------------------------------------------------


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *_, ctx.eps, mask = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mask, output[1])


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    nothing = (None,) * 6
    if dy is None:
        return None, None, None, *nothing
    x, weight, bias, mask, statistics = ctx.saved_tensors
    dx, dweight, dbias = backward_operator(dy, x, weight, bias, statistics, ctx.eps, mask)
    dweight = None if weight is None else dweight
    return dx, dweight, None if bias is None else dbias, *nothing


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, mask)


def _double_backward(ctx: Any, ddx: Tensor, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor, ...]:
    dy, x, weight, bias, statistics, mask = ctx.saved_tensors
    ddweight = None if weight is None else ddweight
    ddbias = None if bias is None else ddbias
    ddy, dx, dweight = double_backward_operator(
        ddx, ddweight, ddbias, dy, x, weight, statistics, ctx.eps, mask
    )
    return ddy, dx, None if weight is None else dweight, None, None, None, None


def _no_third(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("a batch norm of cupybn has no third derivatives")


# ---- the operators -------------------------------------------------------------------------------


_library = torch.library.Library("cupybn", "DEF")


def _operator(name: str, kernel: Any, fake: Any, schema: str) -> Any:
    """The operator ``cupybn::name``; under ``vmap`` it runs once for each entry."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(name + schema, tags=tags)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    operator = getattr(torch.ops.cupybn, name).default

    def repeated(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        results = []
        for i in range(info.batch_size):
            pairs = zip(args, in_dims, strict=True)
            results.append(operator(*(a if dim is None else a.select(dim, i) for a, dim in pairs)))
        stacked = tuple(torch.stack(tensors) for tensors in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_fake(f"cupybn::{name}", fake, lib=_library)
    torch.library.register_vmap(f"cupybn::{name}", repeated, lib=_library)
    return operator


def _differentiable(name: str, backward: Any, keep: Any = None) -> None:
    torch.library.register_autograd(f"cupybn::{name}", backward, setup_context=keep, lib=_library)


forward_operator = _operator(
    "batch_norm",
    _run_forward,
    _fake_forward,
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? num_batches_tracked, float? momentum, float eps, Tensor? mask=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
backward_operator = _operator(
    "batch_norm_backward",
    _run_backward,
    _fake_backward,
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, float eps, "
    "Tensor? mask=None) "
    "-> (Tensor, Tensor, Tensor)",
)
double_backward_operator = _operator(
    "batch_norm_double_backward",
    _run_double_backward,
    _fake_double_backward,
    "(Tensor? ddx, Tensor? ddweight, Tensor? ddbias, Tensor dy, Tensor x, Tensor? weight, "
    "Tensor statistics, float eps, Tensor? mask=None) -> (Tensor, Tensor, Tensor)",
)
_differentiable("batch_norm", _backward, _keep_for_backward)
_differentiable("batch_norm_backward", _double_backward, _keep_for_double_backward)
_differentiable("batch_norm_double_backward", _no_third)
