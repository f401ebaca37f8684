"""The ``.npz`` form: a zip archive of ``.npy`` members, stored uncompressed, as NumPy reads it.

The header is the first member, ``cupybn.json``; then comes one ``NAME.npy`` for each array.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.lib import format as npy

from ..errors import CheckpointError
from .content import (
    HEADER_LIMIT,
    Content,
    Description,
    StateDict,
    name_fault,
    parse_header,
    unpack,
)

_HEADER = "cupybn.json"
_LOCAL_HEADER = 30  # bytes before a member's name; the shortest that they can be
_UTF8_NAME = 0x800
_NPY_HEADER_LIMIT = 2000  # bytes; enough for NumPy's 64 dimensions
_CHUNK = 1 << 20


def write(file: BinaryIO, content: Content) -> None:
    """Writes the archive. Members have no times: the same content gives the same bytes."""
    with ZipFile(file, "w", ZIP_STORED) as archive:
        archive.writestr(ZipInfo(_HEADER), content.header)
        for name, (described, array) in content.arrays.items():
            member = ZipInfo(f"{name}.npy")
            member.file_size = array.nbytes + _NPY_HEADER_LIMIT  # whether it needs zip64
            with archive.open(member, "w") as out:
                npy.write_array_header_1_0(out, {
                    "descr": npy.dtype_to_descr(described.stored),
                    "fortran_order": False,
                    "shape": described.shape,
                })  # fmt: skip
                for chunk in _chunks(array):
                    out.write(chunk)


def _chunks(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    octets = array.reshape(-1).view(np.uint8)
    for start in range(0, octets.size, _CHUNK):
        yield octets[start : start + _CHUNK].data


def read(file: BinaryIO, size: int) -> StateDict:
    """The state in an archive of `size` bytes."""
    try:
        archive = ZipFile(file)
    except BadZipFile as error:
        raise CheckpointError(f"truncated, or not an .npz file: {error}") from error
    with archive:
        members = archive.infolist()
        _check_members(members, size)
        if not members or members[0].filename != _HEADER:
            raise CheckpointError(f"not written by cupybn.save: it does not begin with {_HEADER}")
        if members[0].file_size > HEADER_LIMIT:
            raise CheckpointError(f"altered: a header of {members[0].file_size} bytes")
        header = parse_header(archive.read(members[0]))
        expected = [f"{described.name}.npy" for described in header.arrays]
        if [member.filename for member in members[1:]] != expected:
            raise CheckpointError("altered: its arrays are not those that its header lists")
        pairs = list(zip(header.arrays, members[1:], strict=True))
        for described, member in pairs:
            _check_npy_header(archive, member, described)
        arrays = {
            described.name: _read_array(archive, member, described) for described, member in pairs
        }
    return unpack(header, arrays)


def _check_members(members: list[ZipInfo], size: int) -> None:
    """Names, kinds and places, from the archive's directory alone.

    Members are uncompressed, lie in the file one after the other and do not overlap: what they
    say of their sizes cannot add up to more than the file.
    """
    seen = set()
    position = 0
    for member in members:
        name = member.orig_filename
        reason = name_fault(name.removesuffix(".npy"))
        if reason or name != member.filename:
            raise CheckpointError(f"the name {name!r:.200} is refused: {reason or 'ambiguous'}")
        if name in seen:
            raise CheckpointError(f"{name} is there twice")
        seen.add(name)
        if member.compress_type != ZIP_STORED or member.flag_bits & ~_UTF8_NAME:
            raise CheckpointError(f"{name} is compressed or encrypted; cupybn.save never does that")
        end = member.header_offset + _LOCAL_HEADER + len(name.encode()) + member.file_size
        if member.file_size != member.compress_size or not position <= member.header_offset:
            raise CheckpointError(f"altered: size or place of {name} cannot be")
        if end > size:
            raise CheckpointError(
                f"{name} claims {member.file_size} bytes in a file of {size} bytes"
            )
        position = end


def _check_npy_header(archive: ZipFile, member: ZipInfo, described: Description) -> None:
    """It must be of the array described, and the member as long as that."""
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):
            raise CheckpointError(f"altered: {member.filename} has another .npy version than 1.0")
        try:
            shape, fortran_order, dtype = npy.read_array_header_1_0(file, _NPY_HEADER_LIMIT)
        except MemoryError as error:  # from Python's parser, for expressions nested too deeply
            raise CheckpointError(f"altered: the header of {member.filename} is absurd") from error
        length = file.tell()
    if dtype.hasobject:
        raise CheckpointError(f"{member.filename} holds pickled objects, which are never loaded")
    if (shape, fortran_order, dtype) != (described.shape, False, described.stored):
        raise CheckpointError(f"altered: {member.filename} is not the array that the header lists")
    if length + described.nbytes != member.file_size:
        raise CheckpointError(
            f"{member.filename} claims an array of {described.nbytes} bytes in "
            f"{member.file_size} bytes"
        )


def _read_array(archive: ZipFile, member: ZipInfo, described: Description) -> np.ndarray[Any, Any]:
    """The array of a member whose header was checked."""
    array = np.empty(described.shape, described.stored)
    with archive.open(member) as file:
        file.read(member.file_size - described.nbytes)
        for chunk in _chunks(array):
            chunk[:] = file.read(len(chunk))
    return array
