"""Sequential: layers one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..arrays import Array
from .base import Layer


class Sequential(Layer):
    """Layers one after the other: ``Sequential(a, b)`` or ``Sequential({"a": a, "b": b})``."""

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        super().__init__()
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = dict(layers[0])
        else:
            named = {str(i): layer for i, layer in enumerate(layers)}  # type: ignore[misc]
        for name, layer in named.items():
            if not isinstance(layer, Layer):
                raise TypeError(f"Sequential takes Layers, got {type(layer).__name__}")
            if hasattr(self, name):
                raise ValueError(f"Sequential already has an attribute {name!r}")
            setattr(self, name, layer)

    def compute_forward(self, x: Array, *, save_for_backward: bool = True) -> tuple[Array, Any]:
        contexts = []
        for layer in self.children.values():
            x, context = layer.run_forward(x, save_for_backward)
            if save_for_backward:
                contexts.append((layer, context))
        return x, contexts

    def compute_backward(self, dy: Array, context: Any) -> Array:
        for layer, inner in reversed(context):
            dy = layer.compute_backward(dy, inner)
        return dy

    def __len__(self) -> int:
        return len(self.children)

    def __getitem__(self, index: int) -> Layer:
        return list(self.children.values())[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.children.values())
