"""Batch norm as a function of PyTorch tensors that can be differentiated twice.

The context of a forward keeps x, weight and bias among autograd's saved tensors, so that
checkpointing, hooks on saved tensors and the check for changes in place work; it keeps the
statistics beside them. Several gradients at once (``is_grads_batched``, ``vmap`` of a backward)
go through the operators, which PyTorch knows how to repeat.
"""

from __future__ import annotations

from typing import Any

import torch

from ...collective import CollectiveCall
from ...double_backward import double_backward_call
from ...forward_backward import Saved
from .operators import backward_operator, double_backward_operator
from .passes import run_backward, run_double_backward
from .tensors import HOST, Tensor, on_stream_of, stands_for_another


class Normalise(torch.autograd.Function):
    """``y = Normalise.apply(x, weight, bias, module, backward, mask)``, by ``module.normalise``.

    Its context has no arrays like x or the parameters: autograd keeps those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        module: Any,
        backward: bool,
        mask: Tensor,
    ) -> Tensor:
        y, saved, ctx.direct = module.normalise(x, weight, bias, backward, mask)
        ctx.save_for_backward(x, weight, mask)
        ctx.statistics, ctx.bias = saved, bias  # of which no backward reads the values
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        bound = ctx.statistics.bound
        call = CollectiveCall(bound.comm, *bound.backward_call) if bound.ranks > 1 else None
        try:
            # Unpacking raises if a tensor was changed in place, or freed by an earlier backward;
            # it also runs a checkpoint's recomputation.
            (x, weight, mask), bias, saved = ctx.saved_tensors, ctx.bias, ctx.statistics
            if not stands_for_another(dy, watched=bound.ranks == 1):
                gradients, direct = None, ctx.direct
                if torch.is_grad_enabled():  # with create_graph
                    gradients = Gradients.apply(dy, x, weight, bias, mask, saved, call)
                elif direct is not None:
                    gradients = direct.backward(saved, dy, x, weight)
                if gradients is None:
                    with on_stream_of(x) if x.is_cuda else HOST:
                        gradients = run_backward(call, saved, dy, x, weight, bias, mask)
                return (*gradients, None, None, None)
            of_x = _as_tensor(saved), bound.eps, mask
            dx, dweight, dbias = backward_operator(dy, x, weight, bias, *of_x)
            none = dweight if weight is not None else None, dbias if bias is not None else None
            return dx, *none, None, None, None
        except Exception as error:
            bound.leave(call, "backward", error)
            raise


apply = super(torch.autograd.Function, Normalise).apply
"""``Normalise.apply`` where no transform of ``torch.func`` is at work: without looking for them."""


class Gradients(torch.autograd.Function):
    """(dx, dweight, dbias) of :class:`Normalise`, inside the joint call of its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor,
        saved: Saved,
        call: Any,
    ) -> tuple[Tensor, ...]:
        with on_stream_of(x) if x.is_cuda else HOST:
            gradients = run_backward(call, saved, dy, x, weight, bias, mask)
        ctx.save_for_backward(dy, x, weight, mask)
        ctx.statistics, ctx.bias = saved, bias
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.statistics
        with double_backward_call(saved) as call:
            dy, x, weight, mask = ctx.saved_tensors
            alone = saved.bound.ranks == 1
            if not any(stands_for_another(given, watched=alone) for given in cotangents):
                given = ctx.bias, mask, dy, x, weight, *cotangents
                gradients = Last.apply(call, saved, *given)
            else:
                gradients = double_backward_operator(
                    *cotangents, dy, x, weight, _as_tensor(saved), saved.eps, mask
                )
        ddy, dx, dweight = gradients
        return ddy, dx, None if weight is None else dweight, None, None, None, None


class Last(torch.autograd.Function):
    """(ddy, dx, dweight) of :class:`Gradients`, which cannot be differentiated.

    ``once_differentiable`` would cut them off from x, and ``torch.autograd.grad(value, x)`` would
    skip them: a third derivative without these terms, instead of an error.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Any, saved: Saved, bias: Tensor, mask: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        dy, x, weight, *cotangents = tensors
        with on_stream_of(x) if x.is_cuda else HOST:
            gradients: tuple[Tensor, ...] = run_double_backward(
                call, saved, cotangents, (dy, x, weight, bias, mask)
            )
        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "a batch norm of cupybn.interop.torch has first and second derivatives, no third ones"
        )


def _as_tensor(saved: Saved) -> Tensor:
    """Mean and invstd for the operators, which work on this rank alone.

    Raises:
        RuntimeError: there are other ranks.
    """
    if saved.bound.ranks > 1:
        raise RuntimeError(
            "several gradients at once (is_grads_batched, vectorize=True, check_batched_grad=True, "
            "vmap of a backward) do not go over ranks: call backward once for each of them"
        )
    return torch.stack([torch.as_tensor(values) for values in (saved.mean, saved.invstd)])
