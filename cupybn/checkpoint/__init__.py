"""State dicts in files: ``save`` and ``load``. Knows arrays and metadata, and no Layer."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from ..errors import CheckpointError
from . import npz, safetensors
from .content import StateDict, pack

__all__ = ["StateDict", "load", "save"]

_FORMATS = {".npz": npz, ".safetensors": safetensors}


def save(state_dict: Mapping[str, Any], path: str | bytes | os.PathLike[Any]) -> None:
    """Writes arrays and metadata into a file: all of it, or what was there stays.

    The new file is written beside the target under a temporary name, and takes its place when it
    is on the disk. It gets the permissions that ``open(path, "wb")`` would give, if the file
    system lets them be set. If `path` is a symbolic link, its target is replaced. The
    same state gives the same bytes. A file that is mounted by itself cannot be replaced: the new
    one is copied into it, and the one under the temporary name goes when that is done.

    Args:
        state_dict: from ``Layer.state_dict``, or any mapping from name to array (NumPy, CuPy, or
            with DLPack, ``__cuda_array_interface__`` or ``__array__``): booleans, integers,
            float16, float32, float64 and bfloat16 of any shape and memory order. Its ``metadata``
            (or PyTorch's ``_metadata``), if it has one, is a dict that JSON can express.
        path: ends in ``.npz``, or in ``.safetensors`` (extra ``safetensors``).

    Raises:
        CheckpointError: the path has another suffix.
        ValueError: a name does not fit into a file: empty, "..", absolute, a backslash, ...
        DTypeError: a value is not an array, or of another dtype.
        TypeError: `state_dict` is not a mapping, or JSON cannot express the metadata.
        ImportError: safetensors or ml_dtypes is missing.
        OSError: the file cannot be written: PermissionError if it is read-only. Its ``filename`` is
            `path`; the old file is whole, and the temporary one removed. If copying into a mounted
            file fails half-way, the text names the temporary one, which is whole and stays.
    """
    name = os.fsdecode(path)
    form = _format_of(name)
    content = pack(state_dict)
    try:
        _replace(os.path.realpath(name), lambda file: form.write(file, content))
    except OSError as error:  # it may name the temporary file, or none
        raise OSError(error.errno, error.strerror or str(error), name) from error


def _replace(target: str, write: Callable[[BinaryIO], None]) -> None:
    """Puts a new file, which `write` fills, in the place of `target`."""
    mode, copying = None, False
    with suppress(FileNotFoundError):
        mode = _mode_of_writable(target)
    temporary = os.path.join(os.path.dirname(target), f".cupybn-{secrets.token_hex(8)}.tmp")
    try:
        # Nobody who could not read the old file may read this one, at any moment.
        limit = 0o666 if mode is None else mode
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, limit)) as file:
            write(file)
            if mode is not None:
                with suppress(OSError):  # of a file system whose modes are fixed
                    os.chmod(temporary, mode)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, target)
        except OSError as error:  # EBUSY: the target is mounted by itself
            if error.errno != errno.EBUSY or not hasattr(os, "posix_fallocate"):
                raise
            with open(temporary, "rb") as new, open(target, "r+b") as file:
                _make_room(file, os.fstat(new.fileno()).st_size)
                copying = True
                _copy(new, file)
            os.unlink(temporary)
    except BaseException:
        if not copying:
            with suppress(OSError):
                os.unlink(temporary)
        raise
    # Puts the new name on the disk; without it, a power cut may bring the old file back. The file
    # is saved already: not every system can open folders, or flush them.
    with suppress(OSError):
        descriptor = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_room(file: BinaryIO, size: int) -> None:
    """Lets an old file have as many bytes, or leaves it as it is and raises OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        file.truncate(before)
        raise


def _copy(new: BinaryIO, file: BinaryIO) -> None:
    """Makes a file the same as a new one, which is on the disk."""
    try:
        shutil.copyfileobj(new, file)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        error.strerror = f"{error.strerror}; what was to be saved is in {new.name}"
        raise


def _mode_of_writable(target: str) -> int:
    """The mode of a file that ``open(target, "wb")`` would write to.

    Raises:
        OSError: there is no such file, or it may not be written to.
    """
    status = os.stat(target)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file, cannot be replaced")
    if not status.st_mode & 0o222:  # root could write to it all the same
        raise PermissionError(errno.EACCES, "the file is read-only, and is not replaced")
    os.close(os.open(target, os.O_WRONLY))
    return stat.S_IMODE(status.st_mode)


def load(path: str | bytes | os.PathLike[Any]) -> StateDict:
    """The state dict in the file `path` that ``save`` wrote: NumPy arrays, and its ``metadata``.

    The structure of the file is compared with its size before anything is allocated, and the data
    with the SHA-256 in it. Nothing is ever unpickled.

    Raises:
        CheckpointError: the file is truncated, altered, of a newer format, or was not written by
            ``save``; the text says which.
        ImportError: safetensors, or ml_dtypes for bfloat16 arrays, is missing.
        OSError: the file cannot be read; FileNotFoundError if there is none.
    """
    path = os.fsdecode(path)
    form = _format_of(path)
    # Opening a named pipe does not wait for a writer.
    without_waiting = getattr(os, "O_NONBLOCK", 0)
    with open(
        path, "rb", opener=lambda name, flags: os.open(name, flags | without_waiting)
    ) as file:
        status = os.fstat(file.fileno())
        try:
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError("not a regular file")
            return form.read(file, status.st_size)  # type: ignore[no-any-return]
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # the parsers may raise anything at damage
            # EINVAL is of a damaged offset: a seek to before the start of the file.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            reason = str(error) or type(error).__name__
            known = isinstance(error, CheckpointError)
            raise CheckpointError(f"{path}: {reason if known else f'altered: {reason}'}") from error


def _format_of(path: str) -> Any:
    suffix = os.path.splitext(path)[1]
    if suffix not in _FORMATS:
        raise CheckpointError(f"{path}: the name must end in .npz or .safetensors")
    return _FORMATS[suffix]
