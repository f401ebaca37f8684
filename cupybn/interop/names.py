"""Batch norm state under the names of PyTorch, Chainer, Keras and Flax. Imports none of them.

========================  ===================  ====================  =====================
cupybn, PyTorch           Chainer              Keras                 Flax (Linen)
========================  ===================  ====================  =====================
a.bn.weight               a/bn/gamma           a/bn/gamma            params/a/bn/scale
a.bn.bias                 a/bn/beta            a/bn/beta             params/a/bn/bias
a.bn.running_mean         a/bn/avg_mean        a/bn/moving_mean      batch_stats/a/bn/mean
a.bn.running_var          a/bn/avg_var         a/bn/moving_variance  batch_stats/a/bn/var
a.bn.num_batches_tracked  a/bn/N               -                     -
running_var holds         unbiased variance    biased one            biased one
========================  ===================  ====================  =====================

``momentum`` here and in PyTorch is the share of the new batch:
``running = (1 - momentum) * running + momentum * new``. Chainer's ``decay``, Keras' ``momentum``
and Flax's ``momentum`` are the share of the old value: theirs = 1 - ours. They are arguments of the
layers and not part of the state, as is eps: 1e-5 here, in PyTorch and in Flax, 2e-5 in Chainer,
1e-3 in Keras. Chainer's ``N`` counts the batches of fine-tuning only, where it averages over all of
them: ``momentum=None`` here.

A step of Chainer 7.8.1, Keras 3.15.1 (on JAX) and Flax 0.12.8 showed which variance each keeps.
The fused kernel of Keras 2, for 4-D input, keeps the unbiased one: leave `count` out for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, as_array, on_device_of
from ..checkpoint import StateDict

COUNTER = "num_batches_tracked"


class Convention(NamedTuple):
    """The names of a framework for the state of a batch norm, and the kind of its variance.

    `collections` go before the path of the layer: those of Flax, by the name of the array here.
    """

    separator: str
    names: dict[str, str]
    unbiased: bool
    collections: Mapping[str, str]

    def key(self, path: tuple[str, ...], ours: str) -> str:
        """The framework's key for this layer's array."""
        first = (self.collections[ours],) if ours in self.collections else ()
        return self.separator.join((*first, *path, self.names[ours]))

    def parse(self, key: str) -> tuple[tuple[str, ...], str] | None:
        """(path of the layer, name of the array here); None if it is not a batch norm's."""
        *path, name = key.removeprefix("/").removesuffix(":0").split(self.separator)
        for ours, theirs in self.names.items():
            first = [self.collections[ours]] if ours in self.collections else []
            if name == theirs and path[: len(first)] == first:
                return tuple(path[len(first) :]), ours
        return None


_OURS = ("weight", "bias", "running_mean", "running_var", COUNTER)


def _named(*theirs: str) -> dict[str, str]:
    return dict(zip(_OURS, theirs, strict=False))


_PYTORCH = Convention(".", _named(*_OURS), unbiased=True, collections={})
_FLAX_COLLECTIONS = _named("params", "params", "batch_stats", "batch_stats")
CONVENTIONS = {
    "cupybn": _PYTORCH,
    "pytorch": _PYTORCH,
    "chainer": Convention("/", _named("gamma", "beta", "avg_mean", "avg_var", "N"), True, {}),
    "keras": Convention("/", _named("gamma", "beta", "moving_mean", "moving_variance"), False, {}),
    "flax": Convention("/", _named("scale", "bias", "mean", "var"), False, _FLAX_COLLECTIONS),
}


def convert_state_dict(
    state: Mapping[str, Any],
    source: str = "pytorch",
    target: str = "cupybn",
    *,
    count: int | Mapping[str, int] | None = None,
) -> StateDict:
    """The state of batch norm layers under the names of another framework.

    Args:
        state: flat, from name to array; names as in this module's table. For Chainer what
            ``save_npz`` writes, for Keras ``{w.path: w.numpy() for w in model.weights}``, for Flax
            ``flatten_dict(variables, sep="/")``.
        source, target: "cupybn", "pytorch", "chainer", "keras" or "flax".
        count: values per channel (N * H * W over all ranks) that the running variance was taken
            from, for all layers, or by path with dots. Without it, variances stay, and an
            evaluation with the same eps gives the same result: for inference. With it, they become
            what the target would have kept of the same batches, for training on: multiplied by
            n / (n - 1) on the way from a framework that keeps the biased one to one that keeps the
            unbiased one, and by (n - 1) / n on the way back.

    Returns:
        The arrays, not copied, except for corrected variances. With metadata where the target is
        "cupybn" or "pytorch": version 2 for layers with a counter, else version 1, which a layer
        takes as "keep your count". Where the target has no counter, it is left out.

    Raises:
        ValueError: an unknown framework or a bad count; or keys that do not belong to a batch norm
            with running statistics: pass only those of batch norms.
    """
    theirs, ours = _convention(source), _convention(target)
    layers, others = _by_layer(state, theirs)
    if others:
        raise ValueError(
            f"not of a batch norm with running statistics in the way of {source}: "
            f"{', '.join(map(repr, others))}. Pass only the keys of batch norms"
        )
    result = StateDict()
    for path, arrays in layers.items():
        dotted = ".".join(path)
        if theirs.unbiased != ours.unbiased and count is not None:
            n = _count_of(count, dotted)
            factor = n / (n - 1) if ours.unbiased else (n - 1) / n
            var = arrays["running_var"]
            with on_device_of(var), np.errstate(all="ignore"):
                arrays["running_var"] = (var * factor).astype(var.dtype)
        for name in ours.names:
            if name in arrays:
                result[ours.key(path, name)] = arrays[name]
        if ours is _PYTORCH:
            result.metadata[dotted] = {"version": 2 if COUNTER in arrays else 1}
    return result


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"{name!r} is none of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _by_layer(
    state: Mapping[str, Any], convention: Convention
) -> tuple[dict[tuple[str, ...], dict[str, Any]], list[str]]:
    """(arrays of the batch norms by path and name, keys of everything else).

    A batch norm has running statistics: other layers, too, have a weight and a bias.
    """
    found: dict[tuple[str, ...], dict[str, tuple[str, Array]]] = {}  # with their keys
    others = []
    for key, value in state.items():
        parsed = convention.parse(key)
        if parsed is None:
            others.append(key)
            continue
        path, name = parsed
        if any(not part or "." in part or "/" in part for part in path):
            raise ValueError(f"{key!r}: dots and slashes in a layer's name would not come back")
        layer = found.setdefault(path, {})
        if name in layer:
            raise ValueError(f"{key!r} is there twice: {[known for known, _ in layer.values()]}")
        layer[name] = key, as_array(value, key)
    layers = {
        path: {name: array for name, (_, array) in layer.items()}
        for path, layer in found.items()
        if {"running_mean", "running_var"} <= layer.keys()
    }
    for path, layer in found.items():
        others += [key for key, _ in layer.values()] if path not in layers else []
    return layers, others


def _count_of(count: int | Mapping[str, int], path: str) -> int:
    n = count.get(path) if isinstance(count, Mapping) else count
    if not isinstance(n, Integral) or n < 2:
        raise ValueError(
            f'count must be an integer of at least 2 for each layer, got {n!r} for "{path}"'
        )
    return int(n)
