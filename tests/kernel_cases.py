"""Shapes, values and the two oracles for the kernel tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cached_property, wraps
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import fake_cupy
import numpy as np
from plainly import Plainly

from cupybn.backends import cuda
from cupybn.backends.cuda import launch, source
from cupybn.statistics import BackwardSums, Moments, Transform

NS = (1, 2, 3, 8, 33)
CS = (1, 2, 3, 31, 32, 33, 65, 127, 1025)
LS = (1, 2, 3, 9, 15, 49, 64, 196, 784, 3136, 10007)
ODD_ONES = [(4, 1, 81), (4, 9, 1), (3, 8, 49), (2, 16, 3), (2, 6, 196), (65, 24, 1), (300, 3, 1)]
ODD_ONES += [(7, 1, 1), (5, 3, 1), (3, 1, 5)]  # a rest of more than one sample
SPLIT = [(4, 2, 10007), (2, 2, 31360), (40000, 3, 1), (3000, 64, 1), (700, 8, 49), (65, 3, 784)]
LARGE = [(8, 70000, 1), (3, 70000, 3), (880801, 1, 1)]
MODES = ["plain", "relu", "residual", "residual relu"]


def pairs(values: Iterable[Any]) -> set[Any]:
    """Every two of the values, with their places."""
    return set(combinations(enumerate(values), 2))


def covering(*others: Iterable[Any], limit: int = 1_000_000) -> list[tuple[Any, ...]]:
    """A few (shape, *others) with all pairs of values of N, C, L and the others.

    Pairs of N, C and L that come to more than `limit` elements are left out.
    """
    shapes = [s for s in product(NS, CS, LS) if np.prod(s) <= limit]
    shapes.sort(key=lambda s: (np.prod(s), s))
    chosen, missing = [], {s: pairs(s) for s in shapes}
    while missing:
        chosen.append(max(missing, key=lambda s: len(missing[s])))  # the smallest of those
        done = pairs(chosen[-1])
        missing = {s: left - done for s, left in missing.items() if left - done}
    factors = [[(i, v) for v in values] for i, values in enumerate((NS, CS, LS, *others))]
    left = set().union(*(product(a, b) for a, b in combinations(factors, 2) if b[0][0] > 2))
    more, cases = list(product(*others)), []
    for i, shape in enumerate([*chosen, *shapes]):
        best = max(more, key=lambda m: len(pairs((*shape, *m)) & left))
        if i < len(chosen) or left & pairs((*shape, *best)):
            cases.append((shape, *best))
            left -= pairs((*shape, *best))
        if i >= len(chosen) and not left:
            break
    return cases


def parameter_dtype(dtype):
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def placed(values, dtype, offset=0):
    """The values in a fresh 64-byte aligned array, `offset` elements behind the boundary."""
    dtype = np.dtype(dtype)
    memory = np.empty((values.size + offset) * dtype.itemsize + 64, np.uint8)
    begin = -memory.ctypes.data % 64 + offset * dtype.itemsize
    out = memory[begin : begin + values.size * dtype.itemsize].view(dtype).reshape(values.shape)
    out[...] = values.astype(np.float32).astype(dtype) if dtype != np.float64 else values
    return out


def gaussian(shape, dtype, seed, mean=0.0, offset=0):
    values = np.random.default_rng(seed).standard_normal(shape) + mean
    return placed(values, dtype, offset)


def parameters(c, dtype, seed=7):
    rng = np.random.default_rng(seed)
    weight, bias = rng.uniform(0.5, 1.5, c), rng.standard_normal(c)
    return weight.astype(parameter_dtype(dtype)), bias.astype(parameter_dtype(dtype))


def error(got, expected):
    """The largest error, relative to values above 1."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    if got.size == 0:
        return 0.0
    assert np.isfinite(got).all()
    return float((np.abs(got - expected) / np.maximum(1, np.abs(expected))).max())


class Case:
    """Inputs of one forward and backward, and its results in float64 by the formulas.

    `offsets`, in elements, of x, dy, the residual and the outputs from a 64-byte boundary. With a
    `mask`, (N, L), inputs are NaN and Inf where it is 0, and outputs not 0 before.
    """

    eps = 1e-5

    def __init__(
        self, shape, dtype, mode, seed=0, offsets=(0, 0, 0, 0), x=None, constant=False, mask=None
    ):
        self.x = gaussian(shape, dtype, seed, 0.5, offsets[0]) if x is None else x
        self.dy = gaussian(shape, dtype, seed + 1, 0.25, offsets[1])
        self.weight, self.bias = parameters(shape[1], dtype)
        self.activation = "relu" if "relu" in mode else None
        self.residual = None
        if "residual" in mode:
            self.residual = gaussian(shape, dtype, seed + 2, 0, offsets[2])
        filled = np.full(shape, 0 if mask is None else 7)
        self.outputs = [placed(filled, dtype, offsets[3]) for _ in range(3)]
        self.constant, self.mask = constant, mask
        self.count = shape[0] * shape[2]
        self.valid = np.ones((shape[0], 1, shape[2]), bool)
        if mask is not None:
            self.valid, self.count = mask[:, None] != 0, int(np.count_nonzero(mask))
            masked = np.broadcast_to(~self.valid, shape)
            for tensor, value in ((self.x, np.nan), (self.dy, np.inf), (self.residual, -np.inf)):
                if tensor is not None:
                    tensor[masked] = value
                    tensor[masked & (np.arange(shape[2]) % 3 == 1)] = np.nan

    @property
    def masked(self):
        """What the primitives are told of the mask."""
        return {} if self.mask is None else {"mask": self.mask}

    @property
    def counted(self):
        return {} if self.mask is None else {"mask": self.mask, "count": self.count}

    @cached_property
    def forward(self):
        x, n = np.where(self.valid, self.x.astype(np.float64), 0), max(self.count, 1)
        mean = x.sum(axis=(0, 2)) / n
        mean += np.where(self.valid, x - mean[:, None], 0).sum(axis=(0, 2)) / n
        centred = np.where(self.valid, x - mean[:, None], 0)
        m2 = (centred**2).sum(axis=(0, 2))
        invstd = 1 / np.sqrt(m2 / n + self.eps)
        y = centred * (invstd * self.weight)[:, None] + self.bias[:, None].astype(np.float64)
        if self.residual is not None:
            y = y + self.residual.astype(np.float64)
        if self.activation:
            # Rounding decides whether these pass the ReLU: let nothing depend on it.
            self.dy[(np.abs(y) < 1e-3) & self.valid] = 0
            y = np.maximum(y, 0)
        y = np.where(self.valid, y, 0)
        return SimpleNamespace(mean=mean, var=m2 / n, invstd=invstd, centred=centred, y=y)

    def backward(self, kept):
        """The gradients, given where the ReLU let y through, or None."""
        f, n = self.forward, max(self.count, 1)
        dy = np.where(self.valid, self.dy.astype(np.float64), 0)
        if kept is not None:
            dy = dy * kept
        sum_dy, sum_dy_xmu = dy.sum(axis=(0, 2)), (dy * f.centred).sum(axis=(0, 2))
        inner = dy
        if not self.constant:
            slope = sum_dy_xmu * f.invstd**2 / n
            inner = dy - (sum_dy / n)[:, None] - f.centred * slope[:, None]
        dx = np.where(self.valid, inner * (f.invstd * self.weight)[:, None], 0)
        terms = np.abs(dy).sum(axis=(0, 2)), np.abs(dy * f.centred).sum(axis=(0, 2)) * f.invstd
        return SimpleNamespace(
            dx=dx, dweight=sum_dy_xmu * f.invstd, dbias=sum_dy, dresidual=dy, terms=terms
        )

    @property
    def needs_bits(self):
        return self.activation is not None and self.residual is not None

    @property
    def needs_dresidual(self):
        return self.needs_bits or (self.mask is not None and self.residual is not None)


MASKS = {
    "all valid": lambda rng, n, length: np.full((n, length), 255),
    "half": lambda rng, n, length: rng.integers(0, 2, (n, length)) * rng.integers(1, 256, length),
    "one value": lambda rng, n, length: np.arange(n * length).reshape(n, -1) == n * length * 2 // 3,
    "whole samples": lambda rng, n, length: np.repeat(np.arange(n)[:, None] % 3, length, 1),
    "padded": lambda rng, n, length: rng.integers(0, length + 1, (n, 1)) > np.arange(length),
    "none valid": lambda rng, n, length: np.zeros((n, length)),
}


def mask_of(kind, shape, seed=0, offset=0):
    """The mask of a kind for (N, C, L) data, `offset` bytes behind a 64-byte boundary."""
    values = MASKS[kind](np.random.default_rng(seed), shape[0], shape[2])
    return placed(np.asarray(values), np.uint8, offset)


def there(x):
    """A stand-in for a device array, over the same memory."""
    return None if x is None else fake_cupy.over(x)


def back(x):
    """The NumPy array in a stand-in's memory; of those in a tuple."""
    return type(x)(*map(back, x)) if isinstance(x, BackwardSums) else x.memory


def _mapped(x, of, kind):
    """x with what `of` makes of the arrays in it."""
    if isinstance(x, Moments):
        return Moments(x.count, of(x.mean), of(x.m2))
    if isinstance(x, tuple):
        values = [_mapped(value, of, kind) for value in x]
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    return of(x) if isinstance(x, kind) else x


def numpy_through_cuda():
    """The functions of the CUDA backend for NumPy arrays, in place."""

    def wrapped(function):
        @wraps(function)
        def through(*args, **options):
            args = _mapped(args, fake_cupy.over, np.ndarray)
            options = {name: _mapped(x, fake_cupy.over, np.ndarray) for name, x in options.items()}
            return _mapped(function(*args, **options), lambda x: x.memory, fake_cupy.ndarray)

        return through

    return SimpleNamespace(**{name: wrapped(getattr(cuda, name)) for name in cuda.__all__})


plainly = Plainly(cuda)


def run(backend, case):
    """One forward and backward of a backend, of NumPy or of CUDA: everything it gives."""
    if backend not in (cuda, plainly):
        return SimpleNamespace(**_run(backend, case, lambda x: x, np))
    found = _run(backend, case, there, fake_cupy)
    keep = ("count", "relu_bits", "running")
    results = {name: x if name in keep else back(x) for name, x in found.items()}
    results["relu_bits"] = None if found["relu_bits"] is None else back(found["relu_bits"])
    return SimpleNamespace(**results | {"running": [back(state) for state in found["running"]]})


def _run(backend, case, place, xp):
    y, dx, dresidual = map(place, case.outputs)
    x, dy, weight, bias = map(place, (case.x, case.dy, case.weight, case.bias))
    masked, counted = ({k: place(v) if k == "mask" else v for k, v in given.items()}
                       for given in (case.masked, case.counted))  # fmt: skip
    moments = backend.batch_moments(x, **counted)
    running = xp.zeros_like(weight), xp.ones_like(weight)
    mean, var, invstd = backend.finalize_moments(moments, case.eps, running=running, factor=0.5)
    relu_bits = xp.full((case.x.size + 7) // 8, 0xAA, np.uint8) if case.needs_bits else None
    transform = Transform(mean, invstd, weight, bias)
    options = {"relu": case.activation is not None, "relu_bits": relu_bits, **masked}
    residual = None if case.residual is None else place(case.residual)
    backend.normalize(x, transform, **options, residual3=residual, out3=y)
    sums = backend.backward_reduce(dy, x, transform, **options)
    dweight, dbias = xp.ones_like(weight), xp.ones_like(bias)
    backend.backward_input(
        dy,
        x,
        transform,
        **options,
        sums=None if case.constant else sums,
        count=moments.count,
        out3=dx,
        dresidual3=dresidual if case.needs_dresidual else None,
        local=sums,
        dweight=dweight,
        dbias=dbias,
    )
    return {
        "count": moments.count,
        "mean": mean,
        "var": var,
        "invstd": invstd,
        "y": y,
        "relu_bits": relu_bits,
        "sums": sums,
        "dx": dx,
        "dresidual": dresidual,
        "dweight": dweight - 1,
        "dbias": dbias - 1,
        "running": running,
    }


def run_alone(case):
    """The same by ``local_forward`` and ``local_backward`` of CUDA: all that they write."""
    given = [there(placed(a, a.dtype)) for a in (case.weight, case.bias)]
    running = there(np.zeros_like(case.weight)), there(np.ones_like(case.weight))
    gradients = [there(np.ones_like(case.weight)) for _ in range(2)]
    relu_bits = there(np.full((case.x.size + 7) // 8, 0xAA, np.uint8)) if case.needs_bits else None
    x, dy, residual = there(case.x), there(case.dy), there(case.residual)
    y, dx, dresidual = map(there, case.outputs)
    options = {"relu": case.activation is not None, "relu_bits": relu_bits}
    counted = {}
    if case.mask is not None:
        options["mask"], counted["count"] = there(case.mask), case.count
    state = {"running": running, "factor": 0.5, **counted}
    mean, invstd = cuda.local_forward(
        x, y, *given, case.eps, **options, residual3=residual, **state
    )
    cuda.local_backward(
        dy,
        x,
        dx,
        Transform(mean, invstd, *given),
        **options,
        count=0 if case.constant else case.count,
        dresidual3=dresidual if case.needs_dresidual else None,
        dweight=gradients[0],
        dbias=gradients[1],
    )
    results = [mean, invstd, *running, y, dx, *gradients]
    results += [] if relu_bits is None else [relu_bits]
    results += [dresidual] if case.needs_dresidual else []
    return [back(x).copy() for x in results]


def in_two_launches(moments, form, x, y, weight, bias, eps, **options):
    """``finish_forward`` as the two primitives that it consists of."""
    state = {name: options.pop(name) for name in ("running", "factor") if name in options}
    mean, _, invstd = cuda.finalize_moments(moments, eps, form=form, **state)
    cuda.normalize(x, Transform(mean, invstd, weight, bias), **options, out3=y)
    return mean, invstd


def run_recentred(case, fused):
    """The results of a forward of float64 data after its second message, in one launch or two."""
    y, before = there(case.outputs[0]), case.outputs[0].copy()
    mean, var = case.forward.mean * case.count, case.forward.var * case.count
    moments = Moments(case.count, there(mean), there(var))
    running = tuple(fake_cupy.full_like(there(case.weight), value) for value in (0.3, 0.7))
    relu_bits = fake_cupy.full((y.size + 7) // 8, 0xAA, np.uint8) if case.needs_bits else None
    weight, bias = there(case.weight), there(case.bias)
    finish = cuda.finish_forward if fused else in_two_launches
    statistics = finish(
        moments,
        "recentred",
        there(case.x),
        y,
        weight,
        bias,
        case.eps,
        relu=case.activation is not None,
        residual3=there(case.residual),
        relu_bits=relu_bits,
        running=running,
        factor=0.3,
        **({} if case.mask is None else {"mask": there(case.mask)}),
    )
    results = [*statistics, *running, y, *([] if relu_bits is None else [relu_bits])]
    results = [back(x).copy() for x in results]
    case.outputs[0][...] = before
    return results


def clear_caches():
    """Forgets plans, kernels and this thread's scratch."""
    for name in ("forward_launches", "backward_launches", "tensor_launch", "channel_launch"):
        getattr(launch, name).cache_clear()
    launch._multiprocessors.cache_clear()
    source._kernels.clear()
    launch._kept.scratch.clear()
    launch._captured.clear()


@contextmanager
def resident(setting):
    """One rank's passes in one launch or in two: ``CUPYBN_RESIDENT``, "auto", "0" or "1"."""
    before = os.environ.get(launch.RESIDENT)

    def put(value):
        os.environ.pop(launch.RESIDENT, None)
        os.environ |= {} if value is None else {launch.RESIDENT: value}
        launch.forward_launches.cache_clear()
        launch.backward_launches.cache_clear()

    put(setting)
    try:
        yield
    finally:
        put(before)


@contextmanager
def host_kernels(build=None):
    """The stand-in for CuPy, its kernels run by the machine for PTX, or made by ``build``."""
    before = sys.modules.get("cupy")
    fake_cupy.install()
    if build is not None:
        fake_cupy.build_with(build)
    clear_caches()
    try:
        yield fake_cupy
    finally:
        clear_caches()
        sys.modules.pop("cupy")
        if before is not None:
            sys.modules["cupy"] = before


class _Collector:
    """In the place of modules and their kernels: notes what would be compiled, and launched."""

    def __init__(self):
        self.modules = []
        self.launched = set()

    def __call__(self, text, kernels):
        self.modules.append((text, kernels))
        note = self.launched.add
        launch = lambda name: lambda *arguments, **more: note((text, name))  # noqa: E731
        return SimpleNamespace(get_function=launch)


def launched_by(cases: Iterable[Case]) -> set[tuple[str, str]]:
    """The kernels that the cases launch, with their modules' texts; nothing is run."""
    collector = _Collector()
    with host_kernels(collector):
        for case in cases:
            run(cuda, case)
            with resident("1"):
                run_alone(case)
            if case.x.dtype == np.float64:
                run_recentred(case, fused=True)
    return collector.launched
