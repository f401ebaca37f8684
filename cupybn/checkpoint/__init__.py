"""State dicts in files: ``save`` and ``load``. Knows arrays and metadata, and no Layer."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import CheckpointError
from . import npz, safetensors
from .content import StateDict, pack

__all__ = ["StateDict", "load", "save"]

_FORMATS = {".npz": npz, ".safetensors": safetensors}


def save(state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes arrays and metadata into a file: all of it, or what was there stays.

    The new file is written beside the target under a temporary name, and takes its place when it
    is on the disk. It gets the permissions that ``open(path, "wb")`` would give; where `path` is a
    symbolic link, what it points to is replaced. The same state gives the same bytes.

    Args:
        state_dict: from ``Layer.state_dict``, or any mapping from name to array (NumPy, CuPy, or
            with DLPack, ``__cuda_array_interface__`` or ``__array__``): booleans, integers,
            float16, float32, float64 and bfloat16 of any shape and memory order. Its ``metadata``
            (or PyTorch's ``_metadata``), if it has one, is a dict that JSON can express.
        path: ends in ``.npz``, or in ``.safetensors`` (extra ``safetensors``).

    Raises:
        CheckpointError: the path has another suffix.
        ValueError: a name does not fit into a file: empty, "..", absolute, a backslash, ...
        DTypeError: a value is no array, or of another dtype.
        TypeError: `state_dict` is no mapping, or JSON cannot express the metadata.
        ImportError: the extra is missing.
        OSError: the file cannot be written; the temporary one is removed.
    """
    form = _format_of(path)
    content = pack(state_dict)
    target = os.path.realpath(path)
    mode = _mode_of(target)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".cupybn-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            form.write(file, content)
            if mode is not None:
                os.chmod(temporary, mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def load(path: str | os.PathLike[str]) -> StateDict:
    """The state dict in a file that ``save`` wrote, as NumPy arrays, with its ``metadata``.

    The structure of the file is checked against its size before anything is allocated, and what
    was read against the SHA-256 in it. Nothing is ever unpickled.

    Raises:
        CheckpointError: the file is truncated, altered, of a newer format, or was not written by
            ``save``; the text says which.
        ImportError: the extra ``safetensors``, or ``bfloat16`` for such arrays, is missing.
        OSError: the file cannot be read; FileNotFoundError if there is none.
    """
    form = _format_of(path)
    with open(path, "rb", opener=_without_waiting) as file, _naming(path):
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file")
        state: StateDict = form.read(file, status.st_size)
        return state


def _without_waiting(path: str, flags: int) -> int:
    """Opens the file; a named pipe too, instead of waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _format_of(path: str | os.PathLike[str]) -> Any:
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in _FORMATS:
        raise CheckpointError(f"{path}: the name must end in .npz or .safetensors")
    return _FORMATS[suffix]


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns whatever the parsers raise into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (ImportError, MemoryError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: a damaged offset, and a seek to before the start
            raise
        raise CheckpointError(f"{path}: altered: {error}") from error
    except Exception as error:  # of a parser, at damage it does not expect
        raise CheckpointError(f"{path}: altered: {error or type(error).__name__}") from error


def _mode_of(target: str) -> int | None:
    """The permissions of the file to replace; None if there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, cannot be replaced", target)
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Puts the new name on the disk; without it, a power cut may bring the old file back."""
    if not hasattr(os, "O_DIRECTORY"):  # such systems cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
