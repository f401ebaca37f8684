"""Batch norm over MPI or a process group for PyTorch modules, on the CPU and CUDA, with autograd.

``SyncBatchNorm`` and ``BatchNorm1d``, ``2d``, ``3d`` stand in for those of ``torch.nn``: the same
arguments (``comm`` for ``process_group``), parameters, buffers and state dicts, and in evaluation
mode PyTorch's own arithmetic. In training mode forward and backward are this library's, over the
tensors' own memory; on CUDA tensors CuPy works on PyTorch's current stream. There are second
derivatives, and no third ones.

Every rank runs forward, backward and double backward of the same layers in the same order.
``docs/embedding.md`` says what autograd does about the order, and what a rank must not do.
"""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError("cupybn.interop.torch needs PyTorch: pip install torch") from error

_FOUND = (
    "cupybn.interop.torch is for PyTorch 2.13 and 2.14 (tested with 2.13.0 and 2.14.1), and this "
    f"is PyTorch {_torch.__version__}"
)
if _torch.__version__ < (2, 13):
    raise ImportError(f"{_FOUND}: pip install 'torch>=2.13'")
try:  # a later version may work, or may lack what is imported here
    from .calibration import fold, recalibrate
    from .checkpoint import recompute_contexts
    from .convert import convert_sync_batchnorm, revert_sync_batchnorm
    from .gradients import allreduce_gradients, broadcast_parameters, verify_sync
    from .groups import ProcessGroupCommunicator
    from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
except (AttributeError, ImportError) as error:
    raise ImportError(f"{_FOUND}, which lacks what is needed: {error}") from error

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
