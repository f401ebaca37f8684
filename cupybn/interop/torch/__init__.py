"""Batch norm over MPI or a process group for PyTorch modules, on the CPU and CUDA, with autograd.

``SyncBatchNorm`` and ``BatchNorm1d``, ``2d``, ``3d`` stand in for those of ``torch.nn``: the same
arguments (``comm`` for ``process_group``), parameters, buffers and state dicts, and in evaluation
mode PyTorch's own arithmetic. In training mode forward and backward are this library's, over the
tensors' own memory; on CUDA tensors CuPy works on PyTorch's current stream. Second derivatives are
there, third ones are not.

Every rank runs forward, backward and double backward of the same layers in the same order. What
autograd does about the order, and what a rank must not do, stands in ``docs/embedding.md``.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("cupybn.interop.torch needs PyTorch: pip install torch") from error

from .calibration import fold, recalibrate
from .checkpoint import recompute_contexts
from .convert import convert_sync_batchnorm, revert_sync_batchnorm
from .gradients import allreduce_gradients, broadcast_parameters, verify_sync
from .groups import ProcessGroupCommunicator
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

SyncBatchNorm.convert_sync_batchnorm = staticmethod(convert_sync_batchnorm)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ProcessGroupCommunicator",
    "SyncBatchNorm",
    "allreduce_gradients",
    "broadcast_parameters",
    "convert_sync_batchnorm",
    "fold",
    "recalibrate",
    "recompute_contexts",
    "revert_sync_batchnorm",
    "verify_sync",
]
