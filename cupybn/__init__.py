"""Batch normalization for array frameworks: layers, a stateless form, and synchronisation over MPI.

Importing this imports NumPy only; mpi4py is imported when a communicator is first needed.
"""

__version__ = "0.1.0"

from . import communicators, distributed, functional, testing, typing
from .calibration import fold, recalibrate
from .checkpoint import StateDict, load, save
from .communicators import SelfCommunicator
from .errors import (
    CheckpointError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    CupyBNError,
    DeviceError,
    DTypeError,
    PeerError,
    ShapeError,
    StateDictError,
)
from .layers import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Layer,
    LayerList,
    LoadResult,
    Sequential,
    SyncBatchNorm,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CheckpointError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "CupyBNError",
    "DTypeError",
    "DeviceError",
    "Layer",
    "LayerList",
    "LoadResult",
    "PeerError",
    "Sequential",
    "SelfCommunicator",
    "ShapeError",
    "StateDict",
    "StateDictError",
    "SyncBatchNorm",
    "communicators",
    "convert_sync_batchnorm",
    "distributed",
    "fold",
    "functional",
    "load",
    "recalibrate",
    "revert_sync_batchnorm",
    "save",
    "testing",
    "typing",
]
