"""Layers in a list, and layers one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .base import Layer

_Self = TypeVar("_Self", bound="LayerList")


class LayerList(Layer):
    """Layers as a list that is a child: ``LayerList([a, b])``, with the names "0", "1", ...

    It has no forward of its own: the layer that holds it runs its layers.

    Args:
        layers: in their order; more can be appended.

    Raises:
        TypeError: one of them is not a Layer.
    """

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        super().__init__()
        for layer in layers:
            self.append(layer)

    def append(self: _Self, layer: Layer) -> _Self:
        """Adds a layer at the end, under its number; returns this list.

        Raises:
            TypeError: it is not a Layer.
        """
        self._add(str(len(self)), layer)
        return self

    def _add(self, name: str, layer: Layer) -> None:
        if not isinstance(layer, Layer):
            raise TypeError(f"{type(self).__name__} takes Layers, got {type(layer).__name__}")
        if hasattr(self, name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}")
        setattr(self, name, layer)

    def compute_forward(self, x: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        raise TypeError(
            f"{self.label}: a LayerList has no forward; call its layers, or make it a Sequential"
        )

    def __len__(self) -> int:
        return len(self.children)

    def __getitem__(self, index: int) -> Layer:
        return list(self.children.values())[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.children.values())


class Sequential(LayerList):
    """Layers one after the other: ``Sequential(a, b)`` or ``Sequential({"a": a, "b": b})``.

    ``forward(x, mask=mask)`` hands the mask to each layer that takes one: the batch norms, and
    layers of your own whose ``compute_forward`` has a `mask`. A batch norm whose input has other
    positions than the mask raises ShapeError.
    """

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        super().__init__()
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = dict(layers[0])
        else:
            named = {str(i): layer for i, layer in enumerate(layers)}  # type: ignore[misc]
        for name, layer in named.items():
            self._add(name, layer)

    def compute_forward(
        self, x: Any, *, mask: Any = None, save_for_backward: bool = True
    ) -> tuple[Any, Any]:
        contexts = []
        for layer in self.children.values():
            options = {} if mask is None or not layer._takes_mask else {"mask": mask}
            x, context = layer.run_forward(x, save_for_backward, **options)
            if save_for_backward:
                contexts.append((layer, context))
        return x, contexts

    def compute_backward(self, dy: Any, context: Any) -> Any:
        layer: Layer = self
        try:
            for layer, inner in reversed(context):
                dy = layer.compute_backward(dy, inner)
        except Exception as error:
            layer.say_where(error, "backward")
            raise
        return dy
