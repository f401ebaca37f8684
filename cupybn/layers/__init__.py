"""Layers: state, modes, defaults and the checks that users meet."""

from ..checkpoint import StateDict
from .base import Layer
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .sequential import LayerList, Sequential
from .state import LoadResult
from .sync import SyncBatchNorm

SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Layer",
    "LayerList",
    "LoadResult",
    "Sequential",
    "StateDict",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
]
