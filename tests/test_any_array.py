"""Arrays of other libraries as input: nothing copied, no gradient lost, NumPy out."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import BFLOAT16, DTYPES, rank_environment
from test_layers import normal

import cupybn
from cupybn import DeviceError, DTypeError, SelfCommunicator
from cupybn import functional as F
from cupybn.arrays import as_array, as_written
from cupybn.testing import run_ranks


class OnlyArray:
    """Offers ``__array__`` and nothing else, not even a shape."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class OnlyInterface:
    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


class Elsewhere:
    """On a device: must not be fetched through ``__array__``."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, **options):
        raise AssertionError("taken over")

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("copied from the device")


class OnlyDLPack:
    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


def torch_tensor(array):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if array.dtype in BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def jax_array(array):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    with jax.enable_x64(True):
        return jax.numpy.asarray(array)


def address_of(thing):
    if hasattr(thing, "data_ptr"):
        return thing.data_ptr()
    if hasattr(thing, "unsafe_buffer_pointer"):
        return thing.unsafe_buffer_pointer()
    if isinstance(thing, memoryview):
        return np.asarray(thing).ctypes.data
    return thing.array.ctypes.data


FORMS = {
    "memoryview": memoryview,
    "__array__": OnlyArray,
    "__array_interface__": OnlyInterface,
    "DLPack": OnlyDLPack,
    "torch": torch_tensor,
    "jax": jax_array,
}


def has_no_bfloat16(form, dtype):
    return dtype in BFLOAT16 and form in ("memoryview", "DLPack", "__array_interface__")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_over_the_same_memory(form, dtype):
    if has_no_bfloat16(form, dtype):
        pytest.skip(f"{form} cannot carry bfloat16")
    values = normal((4, 3, 5, 5), dtype)
    thing = FORMS[form](values)
    array = as_array(thing)
    assert type(array) is np.ndarray
    assert array.dtype == dtype
    assert array.ctypes.data == address_of(thing)
    assert array.tobytes() == values.tobytes()


@pytest.mark.parametrize("form", list(FORMS))
def test_layers_and_functions(form):
    make = FORMS[form]
    x, dy = normal((4, 3, 5, 5)), normal((4, 3, 5, 5), seed=1)
    weight, bias = normal((3,), seed=2), normal((3,), seed=3)
    layer, other = cupybn.BatchNorm2d(3), cupybn.BatchNorm2d(3)
    for target, form_of in ((layer, make), (other, lambda array: array)):
        target.weight, target.bias = form_of(weight), form_of(bias)
    y, expected = layer(make(x), make(dy)), other(x, dy)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(layer.backward(make(dy)), other.backward(dy), strict=True):
        assert type(ours) is np.ndarray
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(layer.eval()(make(x)), other.eval()(x))
    y, saved = F.batch_norm_forward(make(x), make(weight), make(bias), residual=make(dy))
    again, saved_too = F.batch_norm_forward(x, weight, bias, residual=dy)
    np.testing.assert_array_equal(y, again)
    for ours, theirs in zip(
        F.batch_norm_backward(make(dy), saved), F.batch_norm_backward(dy, saved_too), strict=True
    ):
        assert type(ours) is np.ndarray
        np.testing.assert_array_equal(ours, theirs)
    mean, var = normal((3,), seed=4), abs(normal((3,), seed=5))
    np.testing.assert_array_equal(
        F.batch_norm_inference(make(x), make(mean), make(var), make(weight), make(bias)),
        F.batch_norm_inference(x, mean, var, weight, bias),
    )


@pytest.mark.parametrize("form", list(FORMS))
def test_primitives(form):
    make = FORMS[form]
    x3, dy3 = normal((4, 3, 25)), normal((4, 3, 25), seed=1)
    weight = normal((3,), seed=2)

    def results(of):
        moments = F.batch_moments(of(x3))
        mean, _, invstd = F.finalize_moments(moments, 1e-5)
        transform = of(mean), of(invstd), of(weight)
        sums = F.backward_reduce(of(dy3), of(x3), *transform)
        dx3 = F.backward_input(of(dy3), of(x3), *transform, sums=sums, count=100)
        return F.normalize(of(x3), *transform[:2], weight=of(weight)), *sums, dx3

    for ours, theirs in zip(results(make), results(lambda array: array), strict=True):
        assert type(ours) is np.ndarray
        np.testing.assert_array_equal(ours, theirs)


def test_a_read_only_input_is_as_good():
    x = normal((4, 3, 5, 5))
    x.flags.writeable = False
    layer = cupybn.BatchNorm2d(3)
    y = layer(x)
    assert y.flags.writeable
    with pytest.raises(ValueError, match="out is read-only"):
        layer.backward(y, out=x)
    assert layer.backward(x).flags.writeable


@pytest.mark.parametrize("device", [7, 8, 14])
def test_another_kind_of_device_is_named(device):
    with pytest.raises(DeviceError, match=f"on DLPack's {device}"):
        cupybn.BatchNorm2d(3)(Elsewhere(device))


@pytest.mark.parametrize("device", [2, 10, 13])
def test_nothing_on_a_gpu_is_fetched_through_array(device):
    try:
        import cupy  # noqa: F401
    except ImportError:
        with pytest.raises(DeviceError, match="pip install cupy-cuda13x"):
            cupybn.BatchNorm2d(3)(Elsewhere(device))
    else:
        with pytest.raises(AssertionError, match="taken over"):
            as_array(Elsewhere(device))


def test_the_other_ranks_hear_of_an_input_without_a_shape():
    x = normal((2, 300, 3), np.float64)

    def forward(comm):
        mine = OnlyArray(x[comm.rank :][:1])
        return F.batch_norm_forward(mine, comm=comm)[0]

    y = np.concatenate(run_ranks(2, forward))
    np.testing.assert_allclose(y, F.batch_norm_forward(x)[0], rtol=0, atol=1e-12)


def test_update_running_writes_into_another_librarys_memory_or_refuses():
    x = normal((4, 3, 5, 5))
    _, saved = F.batch_norm_forward(x, comm=SelfCommunicator())
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    theirs = OnlyDLPack(mean)
    if not np.from_dlpack(theirs).flags.writeable:  # NumPy before 2.2
        with pytest.raises(ValueError, match="running_mean is read-only"):
            F.update_running(theirs, var, saved, 0.5)
        theirs = mean
    F.update_running(theirs, memoryview(var), saved, 0.5)
    np.testing.assert_allclose(mean, 0.5 * saved.mean, rtol=1e-6)
    before = mean.tobytes(), var.tobytes()
    var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var is read-only"):
        F.update_running(mean, var, saved, 0.5)
    with pytest.raises(DTypeError, match="running_mean: a OnlyArray may give a copy"):
        F.update_running(OnlyArray(mean), np.ones(3, np.float32), saved, 0.5)
    assert before == (mean.tobytes(), var.tobytes())


def test_torch_tensors_in_host_memory_need_no_dlpack(monkeypatch):
    """NumPy before 2.2 takes all that comes by DLPack for read-only; so it is of older PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(torch.Tensor, "__dlpack__", None)  # cannot be called
    _, saved = F.batch_norm_forward(torch.randn(4, 3, 5, 5))
    mean, var = torch.zeros(3), torch.ones(3)
    F.update_running(mean, var, saved, 0.5)
    np.testing.assert_allclose(mean.numpy(), 0.5 * saved.mean, rtol=1e-6)


def test_torch_tensors_that_require_grad_are_refused():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    layer = cupybn.BatchNorm2d(3)
    message = r"input is a PyTorch tensor that requires grad.*\.detach\(\).*cupybn\.interop\.torch"
    for tensor in (x, x * 1, torch.nn.Parameter(x.detach())):
        with pytest.raises(DTypeError, match=message):
            layer(tensor)
        with pytest.raises(DTypeError, match=message), torch.no_grad():
            F.batch_norm_forward(tensor)
    with pytest.raises(DTypeError, match="weight is a PyTorch tensor that requires grad"):
        F.batch_norm_forward(x.detach(), torch.ones(3, requires_grad=True))
    with pytest.raises(DTypeError, match="requires grad"):
        F.batch_moments(torch.ones(2, 3, 4, requires_grad=True))
    assert type(layer(x.detach())) is np.ndarray


def test_torch_layouts_and_signs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.randn(4, 3, 5, 5)
    assert (
        as_array(x.to(memory_format=torch.channels_last)).transpose(0, 2, 3, 1).flags.c_contiguous
    )
    half = as_array(x[:, :, ::2].transpose(2, 3))
    assert not half.flags.c_contiguous
    np.testing.assert_array_equal(half, x.numpy()[:, :, ::2].swapaxes(2, 3))
    negated = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    np.testing.assert_array_equal(as_array(negated), negated.resolve_neg().numpy())
    with pytest.raises(DTypeError, match="NumPy cannot take this tensor over"):
        as_array(torch.eye(3).to_sparse())
    with pytest.raises(DeviceError, match="a Tensor on meta"):
        as_array(torch.zeros(3, device="meta"))
    running = torch.zeros(3)
    assert as_written(running, "running").ctypes.data == running.data_ptr()


def test_jax_arrays_cannot_be_written_to_nor_traced():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    x = jax.numpy.ones((4, 3))
    assert not as_array(x).flags.writeable
    with pytest.raises(ValueError, match="running_mean is read-only"):
        as_written(x, "running_mean")
    with pytest.raises(DTypeError, match="NumPy cannot take this array over"):
        jax.jit(lambda x: cupybn.BatchNorm1d(3)(x))(x)
    layer = cupybn.BatchNorm1d(3)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = jax.jit(lambda x: jax.pure_callback(lambda x: layer(x), result, x))(x)
    np.testing.assert_array_equal(y, cupybn.BatchNorm1d(3)(x))


def test_interop_torch_says_what_is_missing():
    code = "import sys; sys.modules['torch'] = None; import cupybn.interop.torch"
    process = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), capture_output=True, text=True
    )
    assert "ImportError: cupybn.interop.torch needs PyTorch: pip install torch" in process.stderr


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            "torch.__version__ = torch.torch_version.TorchVersion('2.6.0')",
            "ImportError: cupybn.interop.torch is for PyTorch 2.13 and 2.14 (tested with 2.13.0 "
            "and 2.14.1), and this is PyTorch 2.6.0: pip install 'torch>=2.13'",
        ),
        ("del torch._C._is_tracing", "which lacks what is needed: module 'torch._C' has no"),
    ],
)
def test_interop_torch_says_which_versions_it_is_for(change, text):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = f"import torch; {change}; import cupybn.interop.torch"
    process = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), capture_output=True, text=True
    )
    assert text in process.stderr
