"""The (N, C, L) view of an array with any number of dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from .arrays import Array
from .errors import ShapeError


@dataclass(frozen=True)
class Layout:
    """The view of an array of `shape` as a C-contiguous (N, C, L) array.

    Rows (memory N, C, spatial) become (N, C, L); columns (channels-last memory) and 2-D arrays
    become (N * spatial, C, 1).
    """

    shape: tuple[int, ...]
    channel_axis: int
    columns: bool

    @cached_property
    def channels(self) -> int:
        return self.shape[self.channel_axis]

    @cached_property
    def per_channel(self) -> tuple[int]:
        return (self.channels,)

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """The shape without the channels: that of a mask."""
        return self.shape[: self.channel_axis] + self.shape[self.channel_axis + 1 :]

    @cached_property
    def shape3(self) -> tuple[int, int, int]:
        n, *spatial = self.positions
        if self.columns:
            return n * prod(spatial), self.channels, 1
        return n, self.channels, prod(spatial)

    @cached_property
    def to_memory(self) -> tuple[int, ...] | None:
        """The order of the axes in memory; None if it is that of the shape."""
        axes = list(range(len(self.shape)))
        axis_in_memory = axes[-1] if self.columns else 1
        if self.channel_axis == axis_in_memory:
            return None
        axes.insert(axis_in_memory, axes.pop(self.channel_axis))
        return tuple(axes)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Elements from one index of each axis to the next, in new memory of this layout."""
        strides, step = [0] * len(self.shape), 1
        for axis in reversed(self.to_memory or range(len(self.shape))):
            strides[axis] = step
            step *= max(self.shape[axis], 1)
        return tuple(strides)

    @cached_property
    def _back(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape in memory, and the axes that lead from there to `shape`."""
        order = self.to_memory or ()
        axes = sorted(range(len(order)), key=order.__getitem__)
        return tuple(self.shape[axis] for axis in order), tuple(axes)

    def view(self, x: Array) -> Array:
        """x as (N, C, L): a view if its memory allows one, else a copy."""
        in_order = x if self.to_memory is None else x.transpose(self.to_memory)
        if not in_order.flags.c_contiguous:
            in_order = in_order.copy(order="C")
        return in_order.reshape(self.shape3)

    def restore(self, x3: Array) -> Array:
        """The (N, C, L) array as an array of `shape`: always a view."""
        if self.to_memory is None:
            return x3.reshape(self.shape)
        shape, axes = self._back
        return x3.reshape(shape).transpose(axes)


def layout_of(x: Array, channel_axis: int) -> Layout:
    """The layout of x, found from its strides; `channel_axis` is 1 or -1.

    An array in neither memory order gets the one of its own shape: rows for channel_axis 1,
    columns for -1.

    Raises:
        ShapeError: x has fewer than two dimensions.
    """
    if x.ndim < 2:
        raise ShapeError(f"expected at least 2D input (got {x.ndim}D input)")
    axis = channel_axis % x.ndim
    columns = axis == x.ndim - 1
    if x.ndim > 2 and not x.flags.c_contiguous:
        in_other_order = np.moveaxis(x, axis, 1 if columns else -1)
        columns ^= in_other_order.flags.c_contiguous
    return _layout(x.shape, axis, columns)


@lru_cache(maxsize=1024)
def _layout(shape: tuple[int, ...], channel_axis: int, columns: bool) -> Layout:
    return Layout(shape, channel_axis, columns)


def check_channel_axis(channel_axis: int) -> int:
    """channel_axis itself if it is 1 or -1, else ValueError."""
    if not isinstance(channel_axis, (int, np.integer)) or channel_axis not in (1, -1):
        raise ValueError(f"channel_axis must be 1 or -1, got {channel_axis!r}")
    return channel_axis
