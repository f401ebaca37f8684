"""The ``.safetensors`` form. The header is the text "cupybn" of its metadata."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError
from .content import (
    HEADER_LIMIT,
    SAFETENSORS_NAMES,
    Content,
    Description,
    StateDict,
    parse_header,
    restored,
    unique,
    unpack,
)

_LENGTH = 8  # bytes before the table of tensors: its length


def _library() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            ".safetensors files need the safetensors package: pip install safetensors"
        ) from error
    return safetensors


def write(file: BinaryIO, content: Content) -> None:
    """Writes the file. The library takes arrays for C-contiguous without a look; these are."""
    tensors = {
        name: restored(described, array) if described.dtype == "bfloat16" else array
        for name, (described, array) in content.arrays.items()
    }
    file.write(_library().numpy.save(tensors, metadata={"cupybn": content.header}))


def read(file: BinaryIO, size: int) -> StateDict:
    """The state in a file of `size` bytes."""
    library = _library()
    start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or length > size - _LENGTH:
        raise CheckpointError(
            f"truncated, or not a .safetensors file: {size} bytes, of which a header of {length}"
        )
    if length > HEADER_LIMIT:
        raise CheckpointError(f"altered: a header of {length} bytes")
    table = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    texts = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(texts, dict) or "cupybn" not in texts:
        raise CheckpointError("not written by cupybn.save: its metadata has no cupybn")
    fields, listed = parse_header(texts["cupybn"])
    _check_table(table, listed, size - _LENGTH - length)
    file.seek(0)
    data = {name: tensor["data"] for name, tensor in library.deserialize(file.read(size))}
    arrays = [np.ndarray(each.shape, each.stored, data[each.name]) for each in listed]
    return unpack(fields, listed, arrays)


def _check_table(table: dict[str, Any], listed: list[Description], size: int) -> None:
    """The tensors are those of the header, and fill the `size` bytes without gap or overlap."""
    if table.keys() != {described.name for described in listed}:
        raise CheckpointError("altered: its arrays are not those that its header lists")
    places = []
    for described in listed:
        entry = table[described.name]
        begin, end = entry["data_offsets"]
        places.append((begin, end))
        dtype = SAFETENSORS_NAMES[described.dtype.replace(">", "<")]
        if (entry["dtype"], entry["shape"]) != (dtype, list(described.shape)):
            raise CheckpointError(f"altered: {described.name} is not as its header lists it")
        if end - begin != described.nbytes:
            raise CheckpointError(
                f"{described.name} claims {described.nbytes} bytes in {end - begin}"
            )
    edges = [0, *chain.from_iterable(sorted(places))]
    if edges[1::2] != edges[:-1:2]:
        raise CheckpointError("altered: its arrays overlap or leave a gap")
    if edges[-1] != size:
        raise CheckpointError(f"truncated or altered: arrays of {edges[-1]} bytes in {size} bytes")
