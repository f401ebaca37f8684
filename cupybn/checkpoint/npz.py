"""The ``.npz`` form: a zip archive of ``.npy`` members, stored uncompressed, as NumPy reads it.

The header is the first member, ``cupybn.json``; then comes one ``NAME.npy`` for each array.
"""

from __future__ import annotations

from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

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


def write(file: BinaryIO, content: Content) -> None:
    """Writes the archive. Members have no times: the same content gives the same bytes."""
    with ZipFile(file, "w", ZIP_STORED) as archive:
        archive.writestr(ZipInfo(_HEADER), content.header)
        for name, (_, array) in content.arrays.items():
            member = ZipInfo(f"{name}.npy")
            member.file_size = array.nbytes + _NPY_HEADER_LIMIT  # whether it needs zip64
            with archive.open(member, "w") as out:
                npy.write_array(out, array, (1, 0), allow_pickle=False)


def read(file: BinaryIO, size: int) -> StateDict:
    """The state in an archive of `size` bytes."""
    try:
        archive = ZipFile(file)
    except BadZipFile as error:
        raise CheckpointError(f"truncated, or not an .npz file: {error}") from error
    with archive:
        members = archive.infolist()
        _check_members(archive, size)
        if not members or members[0].filename != _HEADER:
            raise CheckpointError(f"not written by cupybn.save: it does not begin with {_HEADER}")
        if members[0].file_size > HEADER_LIMIT:
            raise CheckpointError(f"altered: a header of {members[0].file_size} bytes")
        fields, listed = parse_header(archive.read(members[0]))
        expected = [f"{described.name}.npy" for described in listed]
        if [member.filename for member in members[1:]] != expected:
            raise CheckpointError("altered: its arrays are not those that its header lists")
        for described, member in zip(listed, members[1:], strict=True):
            _check_npy_header(archive, member, described)
        arrays = []
        for member in members[1:]:
            with archive.open(member) as array:
                arrays.append(npy.read_array(array, max_header_size=_NPY_HEADER_LIMIT))
    return unpack(fields, listed, arrays)


def _check_members(archive: ZipFile, size: int) -> None:
    """Names, kinds and places, from the archive's directory alone.

    Members are uncompressed, lie in the file one after the other and do not overlap: what they
    say of their sizes cannot add up to more than the file.
    """
    position = 0
    for member in archive.infolist():
        name = member.orig_filename
        reason = name_fault(name.removesuffix(".npy"))
        if reason or name != member.filename:
            raise CheckpointError(f"the name {name!r:.200} is refused: {reason or 'ambiguous'}")
        if archive.getinfo(name) is not member:
            raise CheckpointError(f"{name} is there twice")
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
    """The header must describe this array, and the member must be as long as it says."""
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
