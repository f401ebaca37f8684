"""The exceptions of cupybn. Each also derives from the builtin that PyTorch raises in its place.

After any of them, parameters, gradients, buffers and ``num_batches_tracked`` of the layer that
raised are bit for bit what they were before the call. Layers of a tree that ran before it have run.
"""

from __future__ import annotations


class CupyBNError(Exception):
    """Base of every exception class defined by this library."""


class ShapeError(CupyBNError, ValueError):
    """An array has a wrong shape or number of dimensions, or too few values to normalise."""


class DTypeError(CupyBNError, TypeError):
    """An argument is not an array, or its dtype does not fit the layer."""


class DeviceError(CupyBNError, RuntimeError):
    """An array lives on another device than the layer, or the device is not there."""


class StateDictError(CupyBNError, RuntimeError):
    """A state dict does not fit the layer; nothing was loaded."""


class CheckpointError(CupyBNError, ValueError):
    """A file cannot be read as a checkpoint."""


class CollectiveMismatchError(CupyBNError, RuntimeError):
    """The ranks met in one collective with different layers, directions or settings."""


class PeerError(CupyBNError, RuntimeError):
    """Another rank failed in this call; that rank raises the exception that says why."""


class CollectiveTimeoutError(CupyBNError, TimeoutError):
    """Ranks that are threads, or of a process group, waited for a peer longer than the timeout."""
