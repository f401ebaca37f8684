"""Batch norm over the ranks of a communicator for JAX: a function, and the order of its messages.

Every rank must send the same messages in the same order. XLA orders computations by their data
alone: callbacks that do not depend on each other ran in another order on each rank. So every
message takes a token from the one before it and gives one to the next, forward and backward, and
the wrappers here carry the token::

    def loss(params, x, labels):                 # calls batch_norm(...) anywhere
        ...
    step = jax.jit(ordered_value_and_grad(loss))

``in_order`` is for functions without a gradient. Inside either, ``scan``, ``jit`` and
``checkpoint`` replace JAX's own around calls of ``batch_norm``: JAX's own do not carry the token,
and are refused. Outside of both, a call with values (not traced) sends at once, in the
order of the program; a traced one over several ranks is refused.

A rank whose call fails raises JAX's error for callbacks, with cupybn's exception in its text; the
others raise it with PeerError. The next call works. A backward keeps arrays only, so an unused
gradient costs nothing, and a vjp may be called twice. CPU only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import numpy as np

try:
    import jax
    import jax.numpy as jnp
    from jax.experimental import io_callback
    from jax.extend.core import get_opaque_trace_state
except ImportError as error:
    raise ImportError(
        f"cupybn.interop.jax needs JAX (tested with 0.10.2): pip install 'jax>=0.10' ({error})"
    ) from error

from .. import functional
from ..communicators import Communicator, resolve
from ..errors import DeviceError

__all__ = [
    "Statistics",
    "batch_norm",
    "checkpoint",
    "in_order",
    "jit",
    "ordered_value_and_grad",
    "scan",
    "updated_running",
]


class Statistics(NamedTuple):
    """Statistics of the batch of all ranks; constants to JAX, without gradients.

    Attributes:
        mean, var: (C,), float32, or float64 with x of float64; var is biased.
        count: (), (valid) values per channel, of the same dtype.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class _Call:
    """The options of one call of :func:`batch_norm`. JAX compiles once for equal ones."""

    comm: Communicator = field(compare=False)  # it need not be hashable
    identity: int
    name: str | None
    eps: float
    channel_axis: int
    activation: str | None


class _Open(threading.local):
    """The token of the wrapper that this thread traces, and the trace that it belongs to."""

    token: Any = None
    trace: Any = None


_open = _Open()
_TOKEN = jax.ShapeDtypeStruct((), np.float32)


def batch_norm(
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    comm: Any = None,
    name: str | None = None,
    eps: float = 1e-5,
    channel_axis: int = 1,
    activation: str | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Statistics]:
    """Normalises x with the statistics of the batch of all ranks of `comm`.

    Args:
        x: (N, C) or (N, C, ...), or (N, ..., C) with ``channel_axis=-1``; float16, bfloat16,
            float32 or float64. N may be 0, and another one on each rank.
        weight, bias: (C,), float32, or float64 with x of float64; or None.
        comm: an mpi4py or cupybn communicator; None is ``MPI.COMM_WORLD``.
        name: of the layer, equal on all ranks; different for different layers.
        mask: bool or uint8, of x's shape without its channels, nonzero where x is valid (True is
            valid, as in Flax): everything is that of the valid values alone, and y and the gradient
            of x are 0 elsewhere. None: all are valid; other ranks may have one.
        The others: as :func:`cupybn.functional.batch_norm_forward`, which computes it.

    Returns:
        (y, statistics): y like x. Gradients of x account for all ranks; those of weight and bias
        are this rank's sums.

    Raises:
        RuntimeError: traced outside of :func:`ordered_value_and_grad` and :func:`in_order`, over
            several ranks.
        NotImplementedError: under ``jax.vmap`` or ``jax.shard_map``, or for a second derivative.
        DeviceError: the computation is not for the CPU.
        jax.errors.JaxRuntimeError: what ``batch_norm_forward`` raises is in its text.
    """
    x, communicator = jnp.asarray(x), resolve(comm)
    mask = mask if mask is None else jnp.asarray(mask)
    call = _Call(communicator, id(communicator), name, eps, channel_axis, activation)
    token = _token()
    traced = any(isinstance(array, jax.core.Tracer) for array in (x, weight, bias, mask))
    if token is None and traced and communicator.size > 1:
        raise RuntimeError(
            f"batch_norm {name or ''} is traced where the order of its messages is not the same on "
            "every rank: wrap the function in cupybn.interop.jax.ordered_value_and_grad, or, if "
            "there is no gradient, in in_order, inside jax.jit"
        )
    _check_place(x, name)
    arrays = x, weight, bias, mask, _zero() if token is None else token
    y, statistics, after = _batch_norm(call, *arrays)
    if token is not None:
        _open.token = after
    return y, Statistics(*map(jax.lax.stop_gradient, statistics))


def updated_running(
    running_mean: jax.Array, running_var: jax.Array, statistics: Statistics, momentum: float
) -> tuple[jax.Array, jax.Array]:
    """``(1 - momentum) * running + momentum * new``, with the unbiased variance of all ranks.

    A batch without values on any rank changes nothing. Of one value the variance is taken as it is.

    Args:
        running_mean, running_var: (C,), floating.
        statistics: from :func:`batch_norm`.
        momentum: the share of the new batch, in [0, 1]; not checked, so it raises nothing.

    Returns:
        (mean, var): like `running_mean` and `running_var`, (C,) each.
    """
    mean, var, count = statistics
    unbiased = var * (count / jnp.maximum(count - 1, 1))
    new = (
        jnp.where(count > 0, (1 - momentum) * old + momentum * value, old).astype(old.dtype)
        for old, value in ((running_mean, mean), (running_var, unbiased))
    )
    running_mean, running_var = new
    return running_mean, running_var


def ordered_value_and_grad(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """``jax.value_and_grad`` of a function that calls :func:`batch_norm`, in one order.

    All forwards run in the order of the program, then all backwards in the opposite order, on every
    rank, whether or not it uses the results. Call it inside ``jax.jit`` or by itself.

    Args:
        f, argnums, has_aux: as of ``jax.value_and_grad``.

    Returns:
        A function that returns (value, gradients), or ((value, aux), gradients).

    Raises:
        RuntimeError: inside another wrapper; otherwise as :func:`in_order`.
    """
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @wraps(f)
    def value_and_grad(*args: Any, **kwargs: Any) -> Any:
        if _open.token is not None:
            raise RuntimeError(
                "ordered_value_and_grad stands inside another wrapper of cupybn.interop.jax, whose "
                "messages would not be in one order with its own: it has to be the outermost"
            )

        def with_token(token: Any, *args: Any) -> Any:
            out, token = _carrying(f)(token, *args, **kwargs)
            return (_tie(out[0], token), out[1]) if has_aux else _tie(out, token)

        # The token counts as an argument, so that no backward is left out.
        shifted = tuple(number % len(args) + 1 for number in numbers)
        differentiated = jax.value_and_grad(with_token, (0, *shifted), has_aux)
        value, (token, *grads) = differentiated(_zero(), *args)
        _need(token)
        return value, grads[0] if isinstance(argnums, int) else tuple(grads)

    return value_and_grad


def in_order(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with the messages of its :func:`batch_norm` calls in the order of the program.

    For functions without a gradient; inside another wrapper it changes nothing.

    Raises:
        NotImplementedError: the result is differentiated.
        RuntimeError: a `batch_norm` is called inside a transformation of JAX's that is not one of
            this module's; where it is traced.
    """

    @wraps(f)
    def ordered(*args: Any, **kwargs: Any) -> Any:
        if _token() is not None:
            return f(*args, **kwargs)
        out, token = _carrying(f)(_zero(), *args, **kwargs)
        _need(token)
        return out

    return ordered


def jit(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``jax.jit`` of `f` for use inside of a wrapper; `options` are its own, by name.

    Errors are those of :func:`in_order`.
    """
    inner = jax.jit(_carrying(f), **options)

    @wraps(f)
    def jitted(*args: Any, **kwargs: Any) -> Any:
        return _handing_over(inner, *args, **kwargs)

    return jitted


def scan(f: Callable[..., Any], init: Any, xs: Any = None, length: int | None = None) -> Any:
    """``jax.lax.scan`` for use inside of a wrapper. Every rank takes the same number of steps.

    Args:
        f: from (carry, x) to (carry, y), as there; it may call :func:`batch_norm`.
        init, xs, length: as there.

    Returns:
        (carry, ys). Errors are those of :func:`in_order`.
    """

    def body(carry: Any, x: Any) -> Any:
        token, carry = carry
        (carry, y), token = _carrying(f)(token, carry, x)
        return (token, carry), y

    def whole(token: Any, init: Any, xs: Any) -> Any:
        (token, carry), ys = jax.lax.scan(body, (token, init), xs, length)
        return (carry, ys), token

    return _handing_over(whole, init, xs)


def checkpoint(f: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.checkpoint`` for use inside of a wrapper: the backward runs the forward again.

    It sends its messages again, in the same order on every rank. `f` takes all that it
    differentiates as arguments: it must not close over traced arrays. Errors are those of
    :func:`in_order`.
    """

    @jax.custom_vjp
    def whole(token: Any, *args: Any) -> Any:
        return _carrying(f)(token, *args)

    def forward(token: Any, *args: Any) -> Any:
        return _carrying(f)(token, *args), args

    def backward(args: Any, cotangents: Any) -> Any:
        _, token = cotangents
        # Once more, after all later parts of the forward; its own backward comes after that.
        (_, last), vjp = jax.vjp(_carrying(f), token, *_after(token, args))
        return vjp((cotangents[0], last))

    whole.defvjp(forward, backward)
    return wraps(f)(partial(_handing_over, whole))


# ---- the token ----------------------------------------------------------------------------------


def _zero() -> jax.Array:
    return jnp.zeros((), np.float32)


def _token() -> Any:
    """The token of the open wrapper; None outside of one.

    Raises:
        RuntimeError: a transformation of JAX's is in between, which does not hand on the token.
    """
    if _open.token is not None and _open.trace != _current_trace():
        raise RuntimeError(
            "batch_norm is called inside a jax.jit, jax.lax.scan, jax.checkpoint, jax.grad or the "
            "like, which does not carry the order of messages out of it: use jit, scan and "
            "checkpoint of cupybn.interop.jax there; jax.lax.cond and while_loop cannot be had"
        )
    return _open.token


def _current_trace() -> Any:
    return get_opaque_trace_state(convention="flax")


def _carrying(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with the token as first argument and second result."""

    @wraps(f)
    def carrying(token: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _open.token, _open.trace
        _open.token, _open.trace = token, _current_trace()
        try:
            out = f(*args, **kwargs)
            return out, _open.token
        finally:
            _open.token, _open.trace = outer

    return carrying


def _handing_over(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that carries the token, from a wrapper's token to its next one."""
    opened = _token()
    out, token = f(_zero() if opened is None else opened, *args, **kwargs)
    if opened is not None:
        _open.token = token
    return out


def _need(token: Any) -> None:
    """Keeps all messages up to this token: a rank that uses no result must send them, too."""
    io_callback(_nothing, None, _not_differentiated(token))


@jax.custom_jvp
def _not_differentiated(token: Any) -> Any:
    return token


@_not_differentiated.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "the wrappers of cupybn.interop.jax cannot be differentiated: put ordered_value_and_grad "
        "in the place of jax.grad and in_order"
    )


def _nothing(token: Any) -> None:
    pass


def _after(token: Any, tree: Any) -> Any:
    """The tree, after the token. The token is 0, which XLA does not know."""

    def tied(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.number):
            return leaf
        return leaf + token.astype(jnp.result_type(leaf))

    return jax.tree.map(tied, tree)


@jax.custom_vjp
def _tie(value: Any, token: Any) -> Any:
    """The value after the last message of the forward; its backward begins there too."""
    return _after(token, value)


_tie.defvjp(lambda value, token: (_after(token, value), token), lambda token, grad: (grad, token))


# ---- the calls ----------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(call: _Call, x: Any, weight: Any, bias: Any, mask: Any, token: Any) -> Any:
    y, statistics, _, token = _forward(call, x, weight, bias, mask, token)
    return y, statistics, token


def _batch_norm_forward(call: _Call, x: Any, weight: Any, bias: Any, mask: Any, token: Any) -> Any:
    y, statistics, kept, token = _forward(call, x, weight, bias, mask, token)
    return (y, statistics, token), (x, weight, bias, mask, kept)


def _batch_norm_backward(call: _Call, residuals: Any, cotangents: Any) -> Any:
    dy, _, token = cotangents
    like = (
        *(
            None if array is None else jax.ShapeDtypeStruct(array.shape, array.dtype)
            for array in residuals[:3]
        ),
        _TOKEN,
    )
    *grads, token = _on_host(_host(_host_backward, call), like, *residuals, dy, token)
    return *grads, None, token


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _forward(call: _Call, x: Any, weight: Any, bias: Any, mask: Any, token: Any) -> Any:
    """y, statistics, what the backward needs of them, and the next token."""
    # The host refuses bad arguments, when their turn comes, so that the other ranks hear of it.
    channels = x.shape[call.channel_axis] if x.ndim > 1 and call.channel_axis in (1, -1) else 0
    wide = _wide(x)
    vector = jax.ShapeDtypeStruct((channels,), wide)
    statistics = vector, vector, jax.ShapeDtypeStruct((), wide)
    # float64 and int64 go as pairs of uint32, which JAX can hold without x64.
    kept = jax.ShapeDtypeStruct((4 * channels + 2,), np.uint32)
    results = jax.ShapeDtypeStruct(x.shape, x.dtype), statistics, kept, _TOKEN
    return _on_host(_host(_host_forward, call), results, x, weight, bias, mask, token)


def _wide(x: Any) -> Any:
    return np.float64 if x.dtype == np.float64 else np.float32


@lru_cache(maxsize=1024)
def _host(function: Callable[..., Any], call: _Call) -> Callable[..., Any]:
    """One object for equal calls: JAX compiles a callback once."""
    return partial(function, call)


def _host_forward(call: _Call, x: Any, weight: Any, bias: Any, mask: Any, token: Any) -> Any:
    x, weight, bias, mask = _arrays(x, weight, bias, mask)
    y, saved = functional.batch_norm_forward(
        x,
        weight,
        bias,
        call.eps,
        comm=call.comm,
        name=call.name,
        channel_axis=call.channel_axis,
        activation=call.activation,
        mask=mask,
        save=False,
    )
    wide = _wide(x)
    with np.errstate(all="ignore"):
        statistics = saved.mean.astype(wide), saved.var.astype(wide), wide(saved.count)
    kept = np.concatenate(
        [
            saved.mean.view(np.uint32),
            saved.invstd.view(np.uint32),
            np.array([saved.count]).view(np.uint32),
        ]
    )
    return np.ascontiguousarray(y), statistics, kept, np.float32(0)


def _host_backward(
    call: _Call, x: Any, weight: Any, bias: Any, mask: Any, kept: Any, dy: Any, token: Any
) -> Any:
    x, weight, bias, mask, kept, dy = _arrays(x, weight, bias, mask, kept, dy)
    mean, invstd = kept[:-2].view(np.float64).reshape(2, -1)
    saved = functional.Saved.from_arrays(
        x,
        mean,
        invstd,
        int(kept[-2:].view(np.int64)[0]),
        call.eps,
        weight=weight,
        bias=bias,
        comm=call.comm,
        name=call.name,
        channel_axis=call.channel_axis,
        activation=call.activation,
        mask=mask,
    )
    grads = functional.batch_norm_backward(dy, saved)
    return np.ascontiguousarray(grads.dx), grads.dweight, grads.dbias, np.float32(0)


def _arrays(*arrays: Any) -> list[Any]:
    return [None if array is None else np.asarray(array) for array in arrays]


def _on_host(host: Callable[..., Any], results: Any, *args: Any) -> Any:
    """Calls `host` when the computation gets there; refuses transformations that JAX cannot do."""

    @jax.custom_jvp
    @jax.custom_batching.custom_vmap
    def call(*args: Any) -> Any:
        return jax.pure_callback(host, results, *args)

    @call.fun.def_vmap
    def batched(axis_size: int, in_batched: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "cupybn.interop.jax.batch_norm cannot be used under jax.vmap (nor jax.jacrev and "
            "jax.hessian): its ranks meet in one message a call; call it with the whole batch"
        )

    @call.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "cupybn.interop.jax.batch_norm has no second derivative in JAX; "
            "cupybn.functional.batch_norm_double_backward computes it"
        )

    return call(*args)


def _check_place(x: Any, name: str | None) -> None:
    """Raises unless the computation is for a single CPU device."""
    what = f"cupybn.interop.jax.batch_norm {name or ''}"
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        platforms = {device.platform for device in x.devices()}
    else:
        device = jax.config.jax_default_device
        platforms = {getattr(device, "platform", device) or jax.default_backend()}
    if platforms != {"cpu"}:
        raise DeviceError(
            f"{what} computes on the CPU, but x is on {', '.join(sorted(platforms))}: set "
            "JAX_PLATFORMS=cpu, or use jax.default_device(jax.devices('cpu')[0])"
        )
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise NotImplementedError(
            f"{what} cannot be used under jax.shard_map or jax.pmap: its ranks are those of comm, "
            "one process each; call it outside, or start one process a device"
        )
