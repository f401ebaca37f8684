"""The content of a checkpoint in any file format: arrays, metadata, header, digest.

The header is JSON: ``format``, ``library``, ``arrays`` (name, dtype, shape of each, in order),
``metadata``, and ``sha256`` over all of that and the bytes of the arrays. Files hold C-ordered
little-endian arrays; ``arrays`` has the dtypes that they came with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..arrays import as_array, dtype_named, is_cupy
from ..errors import CheckpointError, DTypeError

FORMAT = 1
LIBRARY = f"cupybn {__version__}"
HEADER_LIMIT = 100_000_000  # bytes; also the limit of the safetensors library

SAFETENSORS_NAMES = {
    "|b1": "BOOL",
    "|i1": "I8",
    "|u1": "U8",
    "<i2": "I16",
    "<u2": "U16",
    "<i4": "I32",
    "<u4": "U32",
    "<i8": "I64",
    "<u8": "U64",
    "<f2": "F16",
    "<f4": "F32",
    "<f8": "F64",
    "bfloat16": "BF16",
}
"""The dtypes that files hold, by ``dtype.str`` (but bfloat16, which NumPy calls "<V2")."""

_FAULTS = {
    r"[\x00-\x1f\x7f\\]": "it has a control character or a backslash",
    r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)": "it is a path that leads out of its folder",
    r"^__metadata__$": "it is what safetensors calls the metadata",
    r"[\ud800-\udfff]": "it is not Unicode text",
}
"""Why a name is refused, by the pattern in it. None has a line break when a ``$`` is looked for."""


class StateDict(dict[str, Any]):
    """Arrays by path, with ``metadata``: for each layer's path, its ``{"version": ...}``.

    A copy, ``state | others`` and ``state |= others`` have it too, with the others' if they have
    any; a plain ``dict(state)`` counts as version 1.
    """

    def __init__(self, *args: Any, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(*args)
        if metadata is None and args:
            metadata = getattr(args[0], "metadata", None)
        entries = (metadata or {}).items()
        self.metadata: dict[str, dict[str, Any]] = {path: dict(entry) for path, entry in entries}

    def copy(self) -> StateDict:
        return StateDict(self)

    def __or__(self, others: Any) -> StateDict:  # type: ignore[override]
        metadata = self.metadata | StateDict(metadata=metadata_of(others)).metadata
        return StateDict(super().__or__(others), metadata=metadata)

    def __ior__(self, others: Any) -> StateDict:  # type: ignore[override]
        super().__ior__(others)
        self.metadata.update(StateDict(metadata=metadata_of(others)).metadata)
        return self

    def part(self, prefix: str) -> StateDict:
        """The state of the layer at this path, with names that start at that layer.

        Args:
            prefix: a path, with or without a dot at its end; "" is all of it.

        Returns:
            The same arrays, not copied, and the versions of that layer and those inside it.

        Raises:
            KeyError: the state has no names of that layer.
        """
        start = _with_dot(prefix)
        path = start.removesuffix(".")
        arrays = {k.removeprefix(start): v for k, v in self.items() if k.startswith(start)}
        metadata = {
            each.removeprefix(path).removeprefix("."): entry
            for each, entry in self.metadata.items()
            if each == path or each.startswith(start)
        }
        if path and not arrays and not metadata:
            raise KeyError(f"no layer {path!r} in this state, whose arrays are {', '.join(self)}")
        return StateDict(arrays, metadata=metadata)

    def with_prefix(self, prefix: str) -> StateDict:
        """The state with this path before each name: the reverse of :meth:`part`."""
        start = _with_dot(prefix)
        arrays = {start + name: array for name, array in self.items()}
        metadata = {(start + path).removesuffix("."): e for path, e in self.metadata.items()}
        return StateDict(arrays, metadata=metadata)


def _with_dot(prefix: str) -> str:
    return f"{prefix.removesuffix('.')}." if prefix else ""


class Description(NamedTuple):
    """An array as the header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype in the file, which has bfloat16 as uint16."""
        return np.dtype("<u2" if self.dtype == "bfloat16" else self.dtype.replace(">", "<"))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.stored.itemsize


class Content(NamedTuple):
    """A header as text and the arrays that it describes, as they are stored."""

    header: str
    arrays: dict[str, tuple[Description, np.ndarray[Any, Any]]]


def pack(state: Mapping[str, Any]) -> Content:
    """The content of a file for this state; see ``save`` for what it raises."""
    if not isinstance(state, Mapping):
        raise TypeError(
            "state_dict must be a mapping from name to array, such as layer.state_dict(), got "
            f"{type(state).__name__}"
        )
    arrays: dict[str, tuple[Description, np.ndarray[Any, Any]]] = {}
    for name, value in state.items():
        if reason := name_fault(name):
            raise ValueError(f"cannot save an array under the name {name!r}: {reason}")
        array = as_array(value, name)
        array = array.get() if is_cupy(array) else array
        dtype = "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str
        if dtype.replace(">", "<") not in SAFETENSORS_NAMES:
            raise DTypeError(
                f"{name} is {array.dtype}; files hold booleans, integers, float16, float32, "
                "float64, bfloat16"
            )
        described = Description(name, dtype, array.shape)
        if described.dtype == "bfloat16":
            array = np.asarray(array, order="C").view(np.uint16)
        arrays[name] = described, array.astype(described.stored, order="C", copy=False)
    fields = {
        "format": FORMAT,
        "library": LIBRARY,
        "arrays": [list(described) for described, _ in arrays.values()],
        "metadata": _as_json(metadata_of(state)),
    }
    fields["sha256"] = digest(fields, [array for _, array in arrays.values()])
    return Content(json.dumps(fields), arrays)


def metadata_of(state: Mapping[str, Any]) -> Any:
    """The metadata of a state: our ``metadata``, or PyTorch's ``_metadata``."""
    ours = getattr(state, "metadata", None)
    return getattr(state, "_metadata", {}) if ours is None else ours


def name_fault(name: Any) -> str:
    """Why an array cannot have this name in a file; "" if it can.

    Names are members of a zip archive, which other tools may unpack: none leads out of a folder.
    """
    if not isinstance(name, str) or not name:
        return "names are strings, and not empty"
    for pattern, reason in _FAULTS.items():
        if re.search(pattern, name):
            return reason
    return "it is longer than 1000 bytes" if len(name.encode()) > 1000 else ""


def _as_json(metadata: Any) -> Any:
    """The metadata as JSON gives it back."""
    try:
        again = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"the metadata must be what JSON can express: {error}") from error
    if again != metadata or not all(isinstance(entry, dict) for entry in again.values()):
        raise TypeError(
            "the metadata must be a dict of dicts, of what JSON can express (lists for tuples, "
            f"strings as keys); got {metadata!r:.200}"
        )
    return again


def digest(fields: Mapping[str, Any], arrays: list[np.ndarray[Any, Any]]) -> str:
    """SHA-256 over the header without itself, then the bytes of each array."""
    rest = {key: value for key, value in fields.items() if key != "sha256"}
    total = sha256(json.dumps(rest, sort_keys=True).encode())
    for array in arrays:
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def parse_header(text: bytes | str) -> tuple[dict[str, Any], list[Description]]:
    """The fields of a header, and the arrays in it, checked except for the digest.

    Raises:
        CheckpointError: a newer format, or not a header.
    """
    fields = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    version = fields.get("format") if isinstance(fields, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError("altered: its header names no format")
    if version > FORMAT:
        raise CheckpointError(
            f"format {version} is newer than {FORMAT}, the newest that {LIBRARY} knows"
        )
    arrays = [_described(*entry) for entry in fields["arrays"]]
    if len({described.name for described in arrays}) < len(arrays):
        raise CheckpointError("two arrays have the same name")
    metadata = fields["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(e, dict) for e in metadata.values()):
        raise CheckpointError("altered: its metadata is no dict of dicts")
    return fields, arrays


def _described(name: Any, dtype: Any, shape: Any) -> Description:
    if reason := name_fault(name):
        raise CheckpointError(f"the name {name!r:.200} is refused: {reason}")
    if not isinstance(dtype, str) or dtype.replace(">", "<") not in SAFETENSORS_NAMES:
        raise CheckpointError(f"{name} has the dtype {dtype!r:.200}, which files do not hold")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise CheckpointError(f"{name} has the shape {shape!r:.200}")
    return Description(name, dtype, tuple(shape))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; equal keys are an error, since JSON readers differ in them."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise CheckpointError("a name is there twice")
    return result


def unpack(
    fields: Mapping[str, Any], listed: list[Description], arrays: list[np.ndarray[Any, Any]]
) -> StateDict:
    """The state of arrays as they are stored, which must be those that a header lists.

    Raises:
        CheckpointError: header or arrays are not what was saved.
        ImportError: bfloat16 without ml_dtypes.
    """
    if digest(fields, arrays) != fields["sha256"]:
        raise CheckpointError("altered: its content does not have the SHA-256 that it had")
    pairs = zip(listed, arrays, strict=True)
    return StateDict(
        {described.name: restored(described, array) for described, array in pairs},
        metadata=fields["metadata"],
    )


def restored(described: Description, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array of a file with the dtype that it came with."""
    if described.dtype == "bfloat16":
        dtype = dtype_named("bfloat16", described.name)
        return array.astype(np.uint16, copy=False).view(dtype)
    return array.astype(described.dtype, copy=False)
