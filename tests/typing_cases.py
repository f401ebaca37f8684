"""Right and wrong uses, for mypy --strict: test_typing.py compares its errors with the comments.

A line with ``# error: CODE`` must give that error of mypy's, every other line none. Nothing here is
ever run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import cupybn
from cupybn import functional
from cupybn.typing import Array, ArrayLike

x = np.zeros((2, 3, 4, 4), np.float32)

# ---- constructors --------------------------------------------------------------------------------

bn = cupybn.SyncBatchNorm(3, channel_axis=-1, activation="relu", name="bn", check_finite=True)
cupybn.SyncBatchNorm(3, 1e-5, None, True, True, cupybn.SelfCommunicator(), weight_init=np.ones)
cupybn.BatchNorm1d(num_features=3, dtype=np.float64, device="cpu", bias=False)
cupybn.SyncBatchNorm(3, chanel_axis=-1)  # error: call-arg
cupybn.SyncBatchNorm(3, process_group=None)  # error: call-arg
cupybn.BatchNorm1d(3, chanel_axis=-1)  # error: call-arg
cupybn.BatchNorm2d(3, comm=None)  # error: call-arg
cupybn.BatchNorm3d("3")  # error: arg-type
cupybn.BatchNorm2d(3, momentum="0.1")  # error: arg-type
cupybn.BatchNorm2d()  # error: call-arg
cupybn.BatchNorm2d(3).to("cpu", dtype=np.float64)
cupybn.BatchNorm2d(3).to(dtpye=np.float64)  # error: call-arg
cupybn.Sequential(bn, x)  # error: arg-type
cupybn.LayerList([bn, x])  # error: list-item

# ---- attributes ----------------------------------------------------------------------------------

weight: Array = bn.weight
bn.weight -= 0.1 * bn.grads["weight"]
bn.weight = np.ones(3, np.float32)
bn.momentum, bn.training = None, False
print(bn.bias, bn.running_mean.shape, bn.running_var[0], int(bn.num_batches_tracked))
print(bn.wieght)  # error: attr-defined
bn.wieght = np.ones(3)  # error: attr-defined
print(bn.running_mena)  # error: attr-defined
print(bn.weight.shpae)  # error: attr-defined
bn.weight = "ones"  # error: assignment
bn.eval().train().zero_grad()
bn.evl()  # error: attr-defined
sequential: cupybn.Layer = cupybn.Sequential(bn)[0]
layers = cupybn.LayerList([bn]).append(cupybn.BatchNorm2d(3))
print([layer.path for layer in layers], layers[0].label)

# ---- calls ---------------------------------------------------------------------------------------

y: Array = bn.forward(x)
y = bn(x, residual=x, out=y)
dx = bn.backward(y, out=y)
bn.forward("no array")  # error: arg-type
bn.forward([1.0, 2.0])  # error: arg-type
bn(x, residaul=x)  # error: call-arg
bn.forward(x, residaul=x)  # error: call-arg
bn.backward(y, ouut=y)  # error: call-arg
bn.backward(3.0)  # error: arg-type
net: cupybn.Layer = cupybn.convert_sync_batchnorm(cupybn.Sequential(bn))

# ---- the functions -------------------------------------------------------------------------------

out, saved = functional.batch_norm_forward(x, weight, None, comm=None, activation="relu")
means: Array = saved.mean
count: int = saved.count
grads = functional.batch_norm_backward(out, saved, out=y)
gradient: Array = grads.dx
functional.update_running(bn.running_mean, bn.running_var, saved, momentum=0.1)
functional.batch_norm_inference(x, means, saved.var, eps=1e-3)
functional.batch_moments(x.reshape(2, 3, 16)).merge(functional.batch_moments(x))
functional.batch_norm_forward("not an array")  # error: arg-type
functional.batch_norm_forward(x, chanel_axis=1)  # error: call-arg
functional.batch_norm_backward(x, x)  # error: arg-type
functional.update_running(x, x, saved)  # error: call-arg
functional.normalize(x, means, "invstd")  # error: arg-type
print(saved.meen)  # error: attr-defined
print(saved.mean.shpae)  # error: attr-defined
print(grads.dweigth)  # error: attr-defined

# ---- arrays in and out ---------------------------------------------------------------------------


def takes(array: ArrayLike) -> None:
    """What a function of somebody else's may declare."""


class Tensor:
    def __dlpack__(self, stream: int | None = None) -> object:
        return None


def any_numpy_array(a: NDArray[Any], b: NDArray[np.float64], c: np.ndarray[Any, Any]) -> Array:
    for array in (a, b, c):
        bn(array)
    return a


bn(memoryview(b"")), bn(Tensor())
takes(y)
takes(np.arange(3))
np.testing.assert_allclose(y, x)
numbers: NDArray[np.float32] = np.asarray(y)
print((1 - y).mean(), abs(y).max(), y[:, 0].std(), y.reshape(2, -1).shape, len(y), float(y.sum()))
arrays: list[Array] = [np.arange(3), np.zeros(2, bool), np.zeros(2, np.float16), np.zeros(2, "f8")]
takes("text")  # error: arg-type
takes(None)  # error: arg-type

# ---- layers of one's own -------------------------------------------------------------------------


class Scale(cupybn.Layer):
    factor: Array

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("factor", np.ones((), np.float32))
        self.register_parameter("shift", 3)  # error: arg-type
        self.inner = cupybn.BatchNorm2d(3)
        self.blocks = cupybn.LayerList()

    def compute_forward(self, x: Array) -> tuple[Array, Any]:
        z: Array = x * self.factor
        h, context = self.inner.run_forward(z, True)
        return h, (x, context)

    def compute_backward(self, dy: Array, context: Any) -> Array:
        self.grads["factor"] += (dy * context[0]).sum()
        print(self.inner.weigth)  # error: attr-defined
        print(self.fcator)  # error: attr-defined
        return dy * self.factor


print(Scale().factor.shape, Scale().blocks.append(Scale()))
print(Scale().facotr)  # error: attr-defined
print(Scale()(x).shape)

# ---- states and files ----------------------------------------------------------------------------

state: cupybn.StateDict = cupybn.load("x.npz")
cupybn.save(state.part("a") | state.with_prefix("b"), b"x.npz")
result = bn.load_state_dict(state, strict=False)
print(result.missing_keys)
print(result.missing_kyes)  # error: attr-defined
cupybn.save(bn, "x.npz")  # error: arg-type
bn.load_state_dict(3)  # error: arg-type
state.partt("a")  # error: attr-defined
scale, shift = cupybn.fold(cupybn.BatchNorm2d(3))
cupybn.testing.check_gradients(bn, x, residual=x)
cupybn.recalibrate(net, [x, (x, 3)])
