"""``python -m cupybn selftest`` where something is wrong: ``selftest.py FAULT [options]``."""

import sys

import fake_cupy
import numpy as np
from mpi4py import MPI

from cupybn import arrays, backends
from cupybn.cli import main
from cupybn.collective import CollectiveCall
from cupybn.communicators import MpiCommunicator
from cupybn.layers import SyncBatchNorm
from cupybn.statistics import FAILED, HEADER

fault, options = sys.argv[1], sys.argv[2:]
last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
allreduce, refuse, backward = (
    MpiCommunicator.allreduce,
    CollectiveCall._refuse,
    SyncBatchNorm.backward,
)


def wrong_sum(self, message, label=""):
    total = allreduce(self, message, label)
    total[HEADER:] *= 1 + 1e-3
    return total


def other_bits(self, message, label=""):
    total = allreduce(self, message, label)
    if last and "gradients" in label:
        total[HEADER:] = np.nextafter(total[HEADER:], np.float32(np.inf))
    return total


def blind(self, summed):
    if summed[FAILED]:
        refuse(self, summed)


def deaf(self, summed):
    pass


def wrong_dx(self, dy, saved=None, **options):
    dx = backward(self, dy, saved, **options)
    return dx * dx.dtype.type(1.5) if last and self.name == "selftest" else dx


def numpy_in_cupys_place():
    fake_cupy.install()
    fake_cupy.be_numpy()
    backends.cuda_backend = backends.numpy_backend
    as_array = arrays.as_array

    def also_of_the_device(x, what="input"):
        return x if arrays.is_cupy(x) else as_array(x, what)

    for module in [module for name, module in sys.modules.items() if name.startswith("cupybn")]:
        if getattr(module, "as_array", None) is as_array:
            module.as_array = also_of_the_device


if fault == "wrong sum":
    MpiCommunicator.allreduce = wrong_sum
elif fault == "other bits":
    MpiCommunicator.allreduce = other_bits
elif fault == "blind":
    CollectiveCall._refuse = blind
elif fault == "deaf":
    CollectiveCall._refuse = deaf
elif fault == "wrong dx":
    SyncBatchNorm.backward = wrong_dx
elif fault == "no device":
    options = ["--device", "cuda"]
elif fault == "device":
    numpy_in_cupys_place()
sys.exit(main(["selftest", "--repeat", "3", *options]))
