"""Forward, backward and double backward of tensors in memory: new tensors, by a bound call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ...arrays import Array, array_of_tensor
from ...backends.plain import plain
from ...collective import CollectiveCall
from ...double_backward import double_backward
from ...forward_backward import Bound, Saved
from .checkpoint import remember, remembered
from .tensors import WIDE, Tensor, arrays_of, check_mask, new_array_like


def run_forward(
    call: CollectiveCall | None,
    bound: Bound,
    x: Tensor,
    array: Array,
    tensors: Sequence[Tensor],
    mask: Tensor = None,
    in_graph: bool = False,
) -> tuple[Tensor, Saved]:
    """(y, context without arrays like x) of a batch, or of one that is recomputed.

    `array` is x; `tensors` are weight, bias, running mean, running variance and the counter, of
    which the last three are updated in place; `mask` is the user's, or None. `in_graph` is as for
    :func:`remembered`.
    """
    wide, moved, batches = WIDE[x.dtype], tensors[2:4], tensors[4]
    weight, bias = arrays_of(tensors[:2], wide)
    params, valid = {"weight": weight, "bias": bias}, _memory(mask, x)
    y, y3 = new_array_like(bound, x)
    saved = remembered(bound.name, bound.shape, in_graph)
    if saved is not None:
        bound.normalize_again(array, params, saved, y3, valid)
        remember(saved)
        return y, saved
    running, wide_ones = None, list(moved)
    if bound.updates:
        if not moved[0].dtype is moved[1].dtype is wide:
            wide_ones = [tensor.to(wide) for tensor in moved]
        on_host = batches is not None and batches.is_cpu
        counter = array_of_tensor(batches).reshape(()) if on_host else np.zeros((), np.int64)
        mean, var = arrays_of(wide_ones, wide)
        running = mean, var, counter
    _, saved = bound.forward(call, array, params, mask=valid, y3=y3, running=running)
    if running is not None and saved.count:
        increment_version(moved if batches is None else tensors[2:])
        for target, values in zip(moved, wide_ones, strict=True):
            if target is not values:
                target.copy_(values)
        if batches is not None and not batches.is_cpu:
            batches.add_(1)
    remember(saved)
    return y, saved


def run_backward(
    call: CollectiveCall | None,
    saved: Saved,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor = None,
) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias), with None where there is no weight or bias."""
    bound, wide = saved.bound, WIDE[x.dtype]
    dweight = None if weight is None else torch.zeros_like(weight, dtype=wide)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
    dx, dx3 = new_array_like(bound, x)
    of_weight, of_bias = arrays_of((dweight, dbias), wide)
    bound.backward(
        call,
        array_of_tensor(dy, "dy"),
        _complete(saved, x, [weight], mask),  # only a ReLU needs the bias
        dx3=dx3,
        dweight=of_weight,
        dbias=of_bias,
    )
    return (
        dx,
        dweight if dweight is None or weight.dtype is wide else dweight.to(weight.dtype),
        dbias if dbias is None or bias.dtype is wide else dbias.to(bias.dtype),
    )


def run_double_backward(
    call: CollectiveCall, saved: Saved, cotangents: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """(ddy, dx, dweight) from (ddx, ddweight, ddbias) and (dy, x, weight, bias, mask)."""
    ddx, *per_channel = cotangents
    dy, x, weight, bias, mask = tensors
    wide = WIDE[x.dtype]
    of_weight, of_bias = arrays_of(per_channel, wide)
    grads = double_backward(
        call,
        None if ddx is None else array_of_tensor(ddx, "ddx"),
        of_weight,
        of_bias,
        _complete(saved, x, [weight, bias], mask),
        array_of_tensor(dy, "dy"),
    )
    results = []
    for values in grads[:2]:
        tensor, array3 = new_array_like(saved.bound, x)
        array3[...] = saved.layout.view(values)
        results.append(tensor)
    if weight is None:
        return *results, None
    dweight = torch.empty_like(weight, dtype=wide)
    array_of_tensor(dweight)[...] = grads.dweight
    return *results, dweight.to(weight.dtype)


def _memory(mask: Tensor, x: Tensor) -> Array | None:
    """The mask as the user gave it, as an array; None for None."""
    if mask is None:
        return None
    check_mask(mask, x)
    return array_of_tensor(mask, "mask")


def _complete(saved: Saved, x: Tensor, parameters: list[Tensor], mask: Tensor) -> Saved:
    """The context with its arrays; a hook may have put x into another memory order since."""
    layout, array = saved.bound.layout, array_of_tensor(x)
    weight, *bias = map(plain, arrays_of(parameters, WIDE[x.dtype]))
    arrays = {"x3": plain(layout.view(array)), "weight": weight, "bias": bias[0] if bias else None}
    if mask is not None:
        arrays["mask"] = saved.bound.valid(_memory(mask, x), array)
    return saved._replace(**arrays)
