"""State dicts in memory: copied out of a tree of layers, and into it, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, as_array, assign, copy_to_host, is_floating, on_device_of
from ..checkpoint.content import StateDict, metadata_of
from ..errors import CupyBNError, StateDictError


class LoadResult(NamedTuple):
    """Keys that a load found missing in the state, and unexpected in it."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return (
            f"LoadResult(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"
        )


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def state_of(layers: Iterable[tuple[str, Any]]) -> StateDict:
    """Copies of the arrays of (path, layer); a shared layer appears under each of its paths."""
    state = StateDict()
    for path, layer in layers:
        state.metadata[path] = {"version": layer.version}
        for name, array in (layer.params | layer.buffers).items():
            with on_device_of(array):
                state[_prefix(path) + name] = array.copy()
    return state


def load_state(layers: list[tuple[str, Any]], state: Mapping[str, Any], strict: bool) -> LoadResult:
    """See ``Layer.load_state_dict``; `layers` are the (path, layer) of a tree, its root first."""
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}")
    errors: list[str] = []
    current = _upgraded(layers, state, errors)
    targets = {
        _prefix(path) + name: target
        for path, layer in layers
        for name, target in (layer.params | layer.buffers).items()
    }
    missing = [key for key in targets if key not in current]
    unexpected = [key for key in current if key not in targets]
    values: dict[str, Array] = {}
    for key, target in targets.items():
        try:
            if key in current:
                values[key] = _fitting(key, current[key], target)
        except CupyBNError as error:  # noqa: PERF203  # all of them are listed
            errors.append(f"{error}.")
    if strict and unexpected:
        errors.insert(0, f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
    if strict and missing:
        errors.insert(0, f"Missing key(s) in state_dict: {_quoted(missing)}.")
    if errors:
        title = f"Error(s) in loading state_dict for {type(layers[0][1]).__name__}:"
        raise StateDictError("\n\t".join([title, *errors]))
    for key, value in values.items():
        assign(targets[key], value)
    return LoadResult(missing, unexpected)


def _upgraded(
    layers: list[tuple[str, Any]], state: Mapping[str, Any], errors: list[str]
) -> dict[str, Any]:
    """A copy of the state in the layers' current versions."""
    current = dict(state)
    for path, layer in layers:
        version = _version_in(metadata_of(state), path)
        if version is None:
            errors.append(f'the metadata of the state has no integer version for "{path}".')
        elif version > layer.version:
            errors.append(
                f'version {version} of the state for "{path}" is newer than version '
                f"{layer.version}, the newest that this {type(layer).__name__} knows."
            )
        elif version < layer.version:
            layer.upgrade_state_dict(current, _prefix(path), version)
    return current


def _version_in(metadata: Any, path: str) -> int | None:
    """The version of a layer's state; 1 if the metadata has none, None if it is not a number."""
    try:
        entry = (metadata or {}).get(path) or {}
        return index(entry.get("version", 1))
    except (AttributeError, TypeError):
        return None


def _fitting(key: str, value: Any, target: Array) -> Array:
    """The value as a host array that can be copied into target.

    Raises:
        CupyBNError: it does not fit.
    """
    array = as_array(value, key)
    if target.shape == () and array.shape == (1,):  # as PyTorch 0.3 wrote counters
        array = array.reshape(())
    if array.shape != target.shape:
        raise StateDictError(
            f"size mismatch for {key}: copying a param with shape {array.shape} from the state, "
            f"the shape in current model is {target.shape}"
        )
    kind = "f" if is_floating(array.dtype) else array.dtype.kind
    if kind not in ("f" if is_floating(target.dtype) else "iu"):
        raise StateDictError(f"dtype mismatch for {key}: {array.dtype} does not fit {target.dtype}")
    if not getattr(target.flags, "writeable", True):
        raise StateDictError(f"{key} is read-only in this model")
    with np.errstate(all="ignore"):  # a value too large for the target becomes Inf
        return copy_to_host(array).astype(target.dtype, copy=False)


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
