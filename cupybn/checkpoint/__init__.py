"""State dicts in files: ``save`` and ``load``. Knows arrays and metadata, and no Layer."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from shutil import copymode
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
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "not a regular file, cannot be replaced", target)
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".cupybn-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            form.write(file, content)
            with suppress(FileNotFoundError):  # of a target that is not there yet
                copymode(target, temporary)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if hasattr(os, "O_DIRECTORY"):  # other systems cannot open folders
        # Puts the new name on the disk; without it, a power cut may bring the old file back.
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    # A named pipe is opened too, instead of waiting for somebody to write into it.
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
        except Exception as error:  # whatever the parsers raise at damage they do not expect
            # EINVAL is of a damaged offset: a seek to before the start of the file.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            reason = str(error) or type(error).__name__
            known = isinstance(error, CheckpointError)
            raise CheckpointError(f"{path}: {reason if known else f'altered: {reason}'}") from error


def _format_of(path: str | os.PathLike[str]) -> Any:
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in _FORMATS:
        raise CheckpointError(f"{path}: the name must end in .npz or .safetensors")
    return _FORMATS[suffix]
