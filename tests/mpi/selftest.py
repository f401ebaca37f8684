"""``python -m cupybn selftest`` where something is wrong: ``selftest.py FAULT [options]``."""

import sys

import fake_cupy
import numpy as np
from mpi4py import MPI

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
    fake_cupy.install()
    fake_cupy.put_off()
sys.exit(main(["selftest", "--repeat", "3", *options]))
