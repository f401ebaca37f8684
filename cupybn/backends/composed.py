"""Whole stretches of a pass, made of a backend's own primitives.

Every backend offers these three; one with a faster way has its own under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..arrays import Array
from ..statistics import Moments, Transform

Statistics = tuple[Array, Array]


def compose(
    backend: ModuleType,
) -> tuple[Callable[..., Statistics], Callable[..., Statistics], Callable[..., None]]:
    """(finish_forward, local_forward, local_backward)."""

    def finish_forward(
        moments: Moments,
        form: str,
        x3: Array,
        y3: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        *,
        relu: bool = False,
        residual3: Array | None = None,
        mask: Array | None = None,
        running: tuple[Array, Array] | None = None,
        factor: float = 0.0,
    ) -> Statistics:
        """``finalize_moments`` and ``normalize`` into y3: (mean, invstd)."""
        mean, _, invstd = backend.finalize_moments(
            moments, eps, running=running, factor=factor, form=form
        )
        backend.normalize(
            x3, Transform(mean, invstd, weight, bias), relu=relu, residual3=residual3, out3=y3,
            mask=mask,
        )  # fmt: skip
        return mean, invstd

    def local_forward(x3: Array, *given: Any, **options: Any) -> Statistics:
        """The forward of one rank; takes what ``finish_forward`` takes behind the form."""
        return finish_forward(backend.batch_moments(x3), "local", x3, *given, **options)

    def local_backward(
        dy3: Array,
        x3: Array,
        dx3: Array,
        transform: Transform,
        *,
        count: int,
        relu: bool = False,
        mask: Array | None = None,
        dresidual3: Array | None = None,
        dweight: Array | None = None,
        dbias: Array | None = None,
    ) -> None:
        """The backward of one rank, into dx3; a count of 0: the statistics are constants."""
        sums = backend.backward_reduce(dy3, x3, transform, relu=relu, mask=mask)
        backend.backward_input(
            dy3, x3, transform, sums=sums if count else None, count=count, relu=relu,
            mask=mask, out3=dx3, dresidual3=dresidual3, local=sums, dweight=dweight, dbias=dbias,
        )  # fmt: skip

    return finish_forward, local_forward, local_backward
