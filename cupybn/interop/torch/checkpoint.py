"""Activation checkpointing: a first forward keeps its statistics for the recomputation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ...forward_backward import Saved


class _Active(threading.local):
    """The contexts this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[_Recording] = []


_active = _Active()


class _Recording:
    """Records the statistics of the batch norms that run inside it."""

    def __init__(self) -> None:
        self.records: list[Saved] = []

    def __enter__(self) -> None:
        _active.contexts.append(self)

    def __exit__(self, *error: object) -> None:
        _active.contexts.remove(self)


class _Recomputation(_Recording):
    """Hands out the statistics of a recording, in order; from the start each time."""

    def __init__(self, recording: _Recording) -> None:
        self.records = recording.records

    def __enter__(self) -> None:
        self.position = 0
        super().__enter__()

    def next(self, label: str, shape: tuple[int, ...]) -> Saved:
        saved = self.records[self.position] if self.position < len(self.records) else None
        if saved is None or (saved.bound.name, saved.layout.shape) != (label, shape):
            was = f"{saved.bound.name} with input {saved.layout.shape}" if saved else "at its end"
            raise RuntimeError(
                f"a checkpoint is recomputed otherwise than it was computed: now {label} with "
                f"input {shape}, where the forward was {was}"
            )
        self.position += 1
        return saved


class _Both:
    """Two contexts as one, the second inside the first; may be entered again."""

    def __init__(self, first: Any, second: Any) -> None:
        self.contexts = first, second

    def __enter__(self) -> None:
        with ExitStack() as entered:
            for context in self.contexts:
                entered.enter_context(context)
            self.stack = entered.pop_all()

    def __exit__(self, *error: Any) -> Any:
        return self.stack.__exit__(*error)


def recompute_contexts(context_fn: Callable[[], tuple[Any, Any]] | None = None) -> tuple[Any, Any]:
    """For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False,
    context_fn=recompute_contexts)``: a context for the forward, and one for its recomputation.

    Another ``context_fn`` of yours, as for selective checkpointing, goes inside it::

        selective = functools.partial(create_selective_checkpoint_contexts, policy)
        context_fn = functools.partial(recompute_contexts, selective)

    In the recomputation the batch norms of this module use the statistics of the forward: they
    return the same bits, do not communicate, and leave running statistics and
    ``num_batches_tracked`` alone. Checkpoints may be nested, each with these contexts. A
    recomputation without them (another ``context_fn``, or ``use_reentrant=True``, which takes none)
    raises RuntimeError: it would communicate and update a second time.
    """
    recording = _Recording()
    contexts = recording, _Recomputation(recording)
    if context_fn is None:
        return contexts
    forward, recomputation = context_fn()
    return _Both(contexts[0], forward), _Both(contexts[1], recomputation)


# Private to PyTorch; checkpoint itself asks it. Not -1: this thread runs a backward.
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def is_usual() -> bool:
    """Whether this is neither a recomputation nor to be recomputed."""
    return not _active.contexts and _graph_task() == -1


def is_watching() -> bool:
    """Whether this thread is in a forward or a recomputation of :func:`recompute_contexts`."""
    return bool(_active.contexts)


def remembered(label: str, shape: tuple[int, ...], in_graph: bool = False) -> Saved | None:
    """The statistics for a batch norm that is being recomputed; None in a first forward.

    A compiled graph (`in_graph`) may compute again in its backward what it did not keep.

    Raises:
        RuntimeError: it is recomputed without :func:`recompute_contexts`, or in another order.
    """
    for context in reversed(_active.contexts):
        if isinstance(context, _Recomputation):
            return context.next(label, shape)
    if _graph_task() != -1 and not in_graph:
        raise RuntimeError(
            f"{label}: a forward in training mode inside a backward. A checkpoint that contains "
            "batch norms must be recomputed from the first statistics: "
            "checkpoint(..., use_reentrant=False, context_fn=cupybn.interop.torch."
            "recompute_contexts)"
        )
    return None


def remember(saved: Saved) -> None:
    """Adds a forward to every recording that this thread is in.

    Recordings outside a recomputation get none: they saw the first forward.
    """
    for context in reversed(_active.contexts):
        if isinstance(context, _Recomputation):
            return
        context.records.append(saved)
