"""State dicts in memory: out of a tree of layers, and into it, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import index
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from ..arrays import Array, as_array, assign, copy_to_host, is_floating, on_device_of
from ..checkpoint import StateDict
from ..errors import CupyBNError, StateDictError


class _Tree(Protocol):
    """What is asked of a layer here."""

    version: ClassVar[int]
    params: dict[str, Array]
    buffers: dict[str, Array]

    def _walk(self, prefix: str) -> Iterator[tuple[str, Any]]: ...


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


def state_of(root: _Tree) -> StateDict:
    """Copies of the tree's arrays; a shared layer appears under each of its paths."""
    state = StateDict()
    for path, layer in root._walk(""):
        state.metadata[path] = {"version": layer.version}
        for name, array in (layer.params | layer.buffers).items():
            with on_device_of(array):
                state[_prefix(path) + name] = array.copy()
    return state


def load_state(root: _Tree, state: Mapping[str, Any], strict: bool) -> LoadResult:
    """See ``Layer.load_state_dict``."""
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}")
    title = f"Error(s) in loading state_dict for {type(root).__name__}:"
    errors: list[str] = []
    current = _upgraded(root, state, errors)
    writes: list[tuple[Array, Array]] = []
    missing = []
    expected = set()
    for path, layer in root._walk(""):
        for name, target in (layer.params | layer.buffers).items():
            key = _prefix(path) + name
            expected.add(key)
            if key not in current:
                missing.append(key)
                continue
            value = _fitting(key, current[key], target, errors)
            if value is not None:
                writes.append((target, value))
    unexpected = [key for key in current if key not in expected]
    if strict and unexpected:
        errors.insert(0, f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
    if strict and missing:
        errors.insert(0, f"Missing key(s) in state_dict: {_quoted(missing)}.")
    if errors:
        raise StateDictError("\n\t".join([title, *errors]))
    for target, value in writes:
        assign(target, value)
    return LoadResult(missing, unexpected)


def _upgraded(root: _Tree, state: Mapping[str, Any], errors: list[str]) -> dict[str, Any]:
    """A copy of the state in the layers' current versions."""
    metadata = getattr(state, "metadata", None)
    if metadata is None:
        metadata = getattr(state, "_metadata", None)
    current = dict(state)
    for path, layer in root._walk(""):
        version = _version_in(metadata, path)
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
    """The version of a layer's state, 1 where nothing is said of it; None for what is no number."""
    try:
        entry = (metadata or {}).get(path) or {}
        return index(entry.get("version", 1))
    except (AttributeError, TypeError):
        return None


def _fitting(key: str, value: Any, target: Array, errors: list[str]) -> Array | None:
    """The value as a host array that can be copied into target, or None and an error."""
    try:
        array = as_array(value, key)
    except CupyBNError as error:
        errors.append(f"{error}.")
        return None
    if array.shape != target.shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {array.shape} from the state, "
            f"the shape in current model is {target.shape}."
        )
        return None
    kind = "f" if is_floating(array.dtype) else array.dtype.kind
    if kind not in ("f" if is_floating(target.dtype) else "iu"):
        errors.append(f"dtype mismatch for {key}: {array.dtype} does not fit {target.dtype}.")
        return None
    if not getattr(target.flags, "writeable", True):
        errors.append(f"{key} is read-only in this model.")
        return None
    with np.errstate(all="ignore"):  # a value too large for the target becomes Inf
        return copy_to_host(array).astype(target.dtype, copy=False)


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
