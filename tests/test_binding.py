"""Bound calls: few Python functions, and never stale: a bound layer behaves as a new one does."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import signal
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import NUMBA
from rank_checks import Spy, Two, bits, normal

import cupybn
from cupybn import (
    BatchNorm1d,
    BatchNorm2d,
    SelfCommunicator,
    Sequential,
    SyncBatchNorm,
    backends,
    collective,
)
from cupybn import functional as F
from cupybn.backends import numpy as numpy_backend
from cupybn.communicators import base
from cupybn.testing import run_ranks

X = normal((8, 16), np.float32)
DY = normal((8, 16), np.float32, seed=1)
ROOTS = tuple(str(Path(module.__file__).parent) for module in (cupybn, np))


def functions_entered(call):
    """Names of the functions of cupybn and NumPy that a call enters, compiled ones too."""
    entered = []

    def note(frame, event, argument):
        module = frame.f_globals.get("__name__") or ""
        known = module.split(".")[0] in ("cupybn", "numpy")
        if event == "call" and (known or frame.f_code.co_filename.startswith(ROOTS)):
            entered.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def step(layer, x=X, dy=DY, **options):
    y = layer.forward(x, **options)
    return y, layer.backward(dy)


def bound(layer, x=X, dy=DY, **options):
    """The layer after three steps of one signature."""
    for _ in range(3):
        step(layer, x, dy, **options)
    return layer


@pytest.fixture(params=["numpy", "numba"])
def backend(request):
    if request.param == "numba" and not NUMBA:
        pytest.skip("Numba is not installed")
    return backends.use_cpu_backend(request.param)


# With MPI a message enters one function more: 24 in all over two ranks with Numba.
LIMITS = {"numpy": (20, 26, 36), "numba": (12, 18, 23)}


@pytest.fixture
def closed(monkeypatch):
    """Ranks of this process were found out of step over some other communicator."""
    monkeypatch.setattr(base, "refused", base.refused.copy())
    monkeypatch.setattr(collective, "refused", base.refused)
    base.refuse(Two(), "a test of mismatches")


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counted on Python 3.11")
@pytest.mark.parametrize("case", ["plain", "ReLU and residual", "two ranks"])
def test_a_bound_step_enters_few_functions(backend, case, closed):
    options = {}
    layer = BatchNorm1d(16)
    if case == "two ranks":
        layer = SyncBatchNorm(16, comm=Two())
    elif case == "ReLU and residual":
        layer, options = BatchNorm1d(16, activation="relu"), {"residual": DY}
    bound(layer, **options)
    entered = functions_entered(lambda: step(layer, **options))
    limits = LIMITS[backend.__name__.split(".")[2].replace("cpu", "numba")]
    limit = dict(zip(["plain", "ReLU and residual", "two ranks"], limits, strict=True))[case]
    assert len(entered) <= limit, entered
    first = functions_entered(lambda: step(layer, X[:5].copy(), DY[:5].copy()))
    assert len(first) > limit  # nothing of this signature was kept, and the counting counts


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="counted on Python 3.11")
@pytest.mark.skipif(not NUMBA, reason="Numba is not installed")
def test_a_pytorch_module_enters_few_functions_of_ours():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from cupybn.interop import torch as interop

    module = interop.BatchNorm1d(16)
    x, dy = torch.tensor(X, requires_grad=True), torch.tensor(DY)
    backends.use_cpu_backend("numba")
    for _ in range(3):
        module(x).backward(dy)
    entered = functions_entered(lambda: module(x).backward(dy))
    assert 20 < len(entered) <= 40, entered


def read_only(kind, name):
    def change(layer):
        getattr(layer, kind)[name].flags.writeable = False

    return change


def replaced(kind, name, values):
    def change(layer):
        old = getattr(layer, kind)[name]
        getattr(layer, kind)[name] = values(old)

    return change


def set_to(name, value):
    return lambda layer: setattr(layer, name, value)


def reattached(layer):
    Sequential({"deeper": Sequential({"bn": layer})})


def reshaped_in_place(kind, name):
    def change(layer):
        getattr(layer, kind)[name].resize((4, 4), refcheck=False)

    return change


def strided(old):
    return np.repeat(old, 2)[::2]


def misaligned(old):
    memory = np.empty(old.nbytes + 1, np.uint8)[1:]
    array = memory.view(old.dtype)
    array[...] = old
    return array


CHANGES = {
    "nothing": lambda layer: None,
    "weight replaced": replaced("params", "weight", lambda old: old * 3),
    "weight changed in place": lambda layer: layer.params["weight"].fill(5),
    "weight assigned": lambda layer: setattr(layer, "weight", np.full(16, 7, np.float32)),
    "weight of another length": replaced("params", "weight", lambda old: old[:3].copy()),
    "weight of another dtype": replaced("params", "weight", lambda old: old.astype("f8")),
    "weight strided": replaced("params", "weight", strided),
    "weight misaligned": replaced("params", "weight", misaligned),
    "weight read-only": read_only("params", "weight"),
    "weight of another shape in place": reshaped_in_place("params", "weight"),
    "bias gone": lambda layer: (layer.params.pop("bias"), layer.grads.pop("bias")),
    "bias replaced": replaced("params", "bias", lambda old: old + 1),
    "gradient replaced": replaced("grads", "weight", np.ones_like),
    "gradient strided": replaced("grads", "bias", strided),
    "gradient of another length": replaced("grads", "weight", lambda old: old[:3].copy()),
    "gradient of another dtype": replaced("grads", "bias", lambda old: old.astype("f8")),
    "gradient read-only": read_only("grads", "weight"),
    "running mean replaced": replaced("buffers", "running_mean", lambda old: old + 1),
    "running mean strided": replaced("buffers", "running_mean", strided),
    "running mean read-only": read_only("buffers", "running_mean"),
    "running variance of another dtype": replaced("buffers", "running_var", np.float64),
    "running variance misaligned": replaced("buffers", "running_var", misaligned),
    "counter replaced": replaced("buffers", "num_batches_tracked", lambda old: old + 10),
    "counter read-only": read_only("buffers", "num_batches_tracked"),
    "running statistics gone": lambda layer: layer.buffers.clear(),
    "evaluation": lambda layer: layer.eval(),
    "evaluation and back": lambda layer: layer.eval().train(),
    "eps": set_to("eps", 0.5),
    "eps not positive": set_to("eps", 0.0),
    "momentum": set_to("momentum", 0.9),
    "momentum None": set_to("momentum", None),
    "momentum out of range": set_to("momentum", 3),
    "activation": set_to("activation", "relu"),
    "activation unknown": set_to("activation", "gelu"),
    "track_running_stats": set_to("track_running_stats", False),
    "check_finite": set_to("check_finite", True),
    "channel_axis": set_to("channel_axis", -1),
    "channel_axis bad": set_to("channel_axis", 0),
    "path": reattached,
    "name": set_to("name", "another"),
    "communicator": set_to("comm", SelfCommunicator()),
    "num_features": set_to("num_features", 5),
    "device": set_to("device", "cuda:0"),
    "dtype": set_to("dtype", np.dtype("f8")),
    "reset": lambda layer: (layer.reset_running_stats(), layer.reset_parameters()),
    "loaded": lambda layer: layer.load_state_dict(SyncBatchNorm(16).state_dict()),
    "gradients zeroed": lambda layer: layer.zero_grad(),
    "recalibrated": lambda layer: cupybn.recalibrate(layer, [X * 2, X[:3]], comm=layer.comm),
}


def outcome(call):
    """What a call gave, with the texts of its notes, for comparison."""
    try:
        return [np.asarray(a).tobytes() for a in call()]
    except Exception as error:
        return type(error), str(error), getattr(error, "__notes__", None)


def sent(layer, x=X, dy=DY):
    """Outcomes of a forward and a backward, what was sent, and the state after them."""
    layer.comm.sent.clear() if isinstance(layer.comm, Spy) else None
    found = [outcome(lambda: [layer.forward(x)]), outcome(lambda: [layer.backward(dy)])]
    messages = list(layer.comm.sent) if isinstance(layer.comm, Spy) else []
    return found, messages, bits(layer), layer.saved is None


class Doubling(Spy):
    """Two ranks with the same batches; writes down what is sent, to the byte."""

    def __init__(self):
        self.rank, self.size, self.sent = 0, 2, []

    def allreduce(self, message, label=""):
        self.sent.append((label, message.tobytes()))
        return message * 2

    def __deepcopy__(self, memo):
        return Doubling()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_behaves_as_one_that_was_never_bound(backend, change, ranks):
    comm = SelfCommunicator() if ranks == 1 else Doubling()
    layer = bound(SyncBatchNorm(16, comm=comm))
    assert len(layer._bindings._bound) == 1
    other = copy.deepcopy(layer)
    other.comm = copy.deepcopy(comm)
    for each in (layer, other):
        CHANGES[change](each)
    assert sent(layer) == sent(other)
    assert sent(layer) == sent(other)


def test_another_backend_computes_at_once(backend):
    layer = bound(BatchNorm1d(16))
    called = []

    class Watched:
        def __getattr__(self, name):
            called.append(name)
            return getattr(numpy_backend, name)

    before = backends.by_type[np.ndarray]
    backends.by_type[np.ndarray] = Watched()
    try:
        step(layer)
    finally:
        backends.by_type[np.ndarray] = before
    assert {"local_forward", "local_backward"} <= set(called)


@pytest.mark.parametrize("kind", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_trains_its_own_arrays(kind):
    layer = bound(BatchNorm1d(16))
    other = kind(layer)
    assert not other._bindings._bound
    before = bits(layer)
    bound(other)
    assert bits(layer) == before
    assert bits(other) != before


def test_a_shallow_copy_has_options_of_its_own():
    layer = bound(BatchNorm1d(16))
    other = copy.copy(layer)
    other.eps = 0.5
    fresh = BatchNorm1d(16, eps=0.5)
    np.testing.assert_array_equal(other(X), fresh(X))
    np.testing.assert_array_equal(layer(X), BatchNorm1d(16)(X))


@pytest.mark.parametrize("step_name", ["communicator", "label", "_check_input", "_settings"])
def test_a_subclass_with_a_step_of_its_own_is_asked_every_time(step_name):
    asked = []

    def own(self, *args):
        asked.append(step_name)
        value = getattr(SyncBatchNorm, step_name)
        return value.fget(self) if isinstance(value, property) else value(self, *args)

    step_of = property(own) if step_name == "label" else own
    layer = type("Own", (SyncBatchNorm,), {step_name: step_of})(16, comm=Two())
    bound(layer)
    asked.clear()
    step(layer)
    assert asked
    assert not layer._bindings._bound


def test_no_x_is_kept_alive():
    layer = BatchNorm1d(16)
    for _ in range(4):
        x = X.copy()
        gone = weakref.ref(x)
        y = layer.forward(x, save_for_backward=False)
        del x, y
        gc.collect()
        assert gone() is None


def test_only_a_few_signatures_are_kept():
    layer = BatchNorm1d(16)
    for n in range(2, 200):
        for _ in range(3):
            step(layer, X[:1].repeat(n, axis=0), DY[:1].repeat(n, axis=0))
    assert len(layer._bindings._bound) <= 16
    assert len(layer._bindings._met) <= 16


def test_an_optimiser_step_leaves_the_binding_alone():
    layer = bound(BatchNorm1d(16))
    before = layer._bindings
    layer.weight -= 0.1 * layer.grads["weight"]
    assert layer._bindings is before


def test_threads_share_a_layer():
    layer = BatchNorm2d(3).eval()
    arrays = [normal((2 + i % 5, 3, 4, 4), np.float32, seed=i) for i in range(40)]
    expected = [layer(x) for x in arrays]
    wrong = []

    def work():
        for _ in range(5):
            for x, y in zip(arrays, expected, strict=True):
                if not (layer(x) == y).all():
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("fault", ["forward", "backward", "forward, out over x"])
@pytest.mark.parametrize("culprit", ["bound", "new"])
def test_ranks_that_are_bound_meet_ranks_that_are_not(fault, culprit):
    """Rank 0 has met the signature before, rank 1 has not; one of them fails."""

    def rank(comm):
        layer = SyncBatchNorm(16, comm=comm, name="bn")
        x = X[: 8 - comm.rank].copy()
        for _ in range(3):
            step(layer, X if comm.rank == 0 else X[: 2 + _], DY if comm.rank == 0 else DY[: 2 + _])
        before = bits(layer)
        fails = (culprit == "bound") == (comm.rank == 0)
        x = X if comm.rank == 0 else X[:7]
        call = lambda: layer.forward(x)  # noqa: E731
        if fault == "backward":
            layer.forward(x)
            before = bits(layer)
            call = lambda: layer.backward(DY[:3] if fails else DY[: len(x)])  # noqa: E731
        elif fails and fault == "forward":
            layer.params["weight"] = layer.params["weight"][:3]
        elif fails:
            call = lambda: layer.forward(x, out=x)  # noqa: E731
        error = outcome(lambda: [call()])
        layer.params["weight"] = np.ones(16, np.float32)
        unchanged = [b for b in bits(layer) if b[0] != "weight"]
        assert unchanged == [b for b in before if b[0] != "weight"]
        step(layer, x, DY[: len(x)])
        return error[0], error[1]

    (first, text), (second, other) = run_ranks(2, rank, timeout=20)
    mine, theirs = (first, second) if culprit == "bound" else (second, first)
    assert issubclass(mine, ValueError)
    assert theirs is cupybn.PeerError
    direction = fault.partition(",")[0]
    number = 0 if culprit == "bound" else 1
    blame = other if culprit == "bound" else text
    assert blame.startswith(f"{direction} of 'bn': rank {number} failed, and raised the exception")


def test_functions_are_bound_too(backend):
    weight = np.ones(16, np.float32)

    def call(x=X, w=weight, **options):
        y, saved = F.batch_norm_forward(x, w, **options)
        return y, F.batch_norm_backward(DY, saved)

    for _ in range(3):
        call()
    few = len(functions_entered(call))
    assert few < len(functions_entered(lambda: call(eps=1e-3)))
    for options in ({"w": weight[:3]}, {"w": None}, {"eps": 0.1}, {"activation": "relu"}):
        fresh = outcome(lambda o=options: [call(X.copy(), **o)[0]])
        assert outcome(lambda o=options: [call(**o)[0]]) == fresh


def test_an_activation_that_no_backend_handles_cannot_pass():
    """The name is resolved in one place, so a new one is refused by layers and functions alike."""
    for make in (
        lambda: BatchNorm1d(16, activation="gelu"),
        lambda: F.batch_norm_forward(X, activation="gelu"),
        lambda: F.batch_norm_inference(X, np.zeros(16, "f"), np.ones(16, "f"), activation="gelu"),
        lambda: F.normalize(X[..., None], np.zeros(16), np.ones(16), activation="gelu"),
        lambda: F.backward_reduce(
            X[..., None], X[..., None], np.zeros(16), np.ones(16), activation="gelu"
        ),
    ):
        with pytest.raises(ValueError, match="activation must be None or 'relu', got 'gelu'"):
            make()
    layer = BatchNorm1d(16)
    layer.activation = "gelu"
    with pytest.raises(ValueError, match="got 'gelu'"):
        layer(X)
    for backend in (numpy_backend, backends.compiled_backend, backends.cuda_backend):
        with pytest.raises(TypeError, match="activation"):
            backend.normalize(X[..., None], None, activation="gelu")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_an_interrupt_leaves_the_statistics_and_their_counter_together(backend):
    """Three hundred at random moments: all of a step has happened, or none."""
    layer, other = bound(BatchNorm1d(16)), bound(BatchNorm1d(16))
    names = ("running_mean", "running_var")
    after = {3: [other.buffers[name].tobytes() for name in names]}

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)
    interrupts = 0
    try:
        while interrupts < 300:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, random.uniform(1e-4, 4e-3))
                while True:
                    layer.forward(X)
            except KeyboardInterrupt:
                interrupts += 1
            batches = int(layer.num_batches_tracked)
            while max(after) < batches:
                other.forward(X)
                found = [other.buffers[name].tobytes() for name in names]
                after[int(other.num_batches_tracked)] = found
            assert [layer.buffers[name].tobytes() for name in names] == after[batches]
            layer.num_batches_tracked[...] = 3
            for name, value in zip(names, after[3], strict=True):
                layer.buffers[name][...] = np.frombuffer(value, np.float32)
    finally:
        signal.signal(signal.SIGVTALRM, before)
