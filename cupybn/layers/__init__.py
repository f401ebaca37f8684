"""Layers: state, modes, defaults and the checks that users meet."""

from ..checkpoint import StateDict
from .base import Layer, Sequential
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .state import LoadResult

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Layer",
    "LoadResult",
    "Sequential",
    "StateDict",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
]
