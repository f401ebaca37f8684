"""``Layer``: named parameters, gradients, buffers and children, explicit forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ..arrays import as_array, assign, check_device, is_floating, move, on_device_of
from ..checkpoint import StateDict
from ..checks import check_layer_dtype
from ..errors import DTypeError, ShapeError
from ..forward_backward import call_name
from ..typing import Array, ArrayLike
from .state import LoadResult, load_state, state_of

_Self = TypeVar("_Self", bound="Layer")


_EMPTY: Any = object()  # the saved context of a layer that needs none: None means no forward
_CONTAINERS = (list, tuple, set, frozenset, dict)
_OWN = frozenset({"params", "grads", "buffers", "children", "saved", "_absent"})


def _layers_in(value: Any, depth: int = 3) -> Iterator[Layer]:
    """Layers in a list, tuple, set or dict, or in those inside it: among the first ten of each."""
    if isinstance(value, Layer):
        yield value
    elif depth and isinstance(value, _CONTAINERS):
        for inner in islice(value.values() if isinstance(value, dict) else value, 10):
            yield from _layers_in(inner, depth - 1)


def _changed(array: Any, device: str | None, dtype: Any) -> Any:
    """The array moved to the device and, if floating, cast to the dtype; None keeps either."""
    array = array if device is None else move(array, device)
    if dtype is None or not is_floating(array.dtype):
        return array
    with on_device_of(array), np.errstate(all="ignore"):  # a value too large becomes Inf
        return array.astype(dtype, copy=False)


class Layer:
    """Base class of layers that keep their own arrays.

    To write one, call ``super().__init__()``, then :meth:`register_parameter`,
    :meth:`register_buffer` or assign child layers to attributes (several of them as a
    :class:`~cupybn.LayerList`: in a plain list they are a TypeError), and implement

    * ``compute_forward(self, x, **options) -> (y, context)``: `context` is whatever backward needs.
      Declare a keyword ``save_for_backward`` to be told whether the context will be kept.
    * ``compute_backward(self, dy, context, **options) -> dx``: adds to arrays of ``self.grads``.

    A layer made of layers calls their :meth:`run_forward` and ``compute_backward``, and keeps their
    contexts in its own: examples/own_layer.py has both kinds. For type checkers, annotate the
    registered names in the class: ``factor: cupybn.typing.Array``.

    Attributes:
        params, grads, buffers: dicts from name to array; ``grads`` has the keys, shapes and dtypes
            of ``params``. Registered names read as attributes too; assigning copies into the array.
        children: dict from name to Layer.
        training: the mode; a new layer is in training mode.
        device: "cpu" or "cuda:<n>", set by :meth:`to`.
        saved: the context of the last saving forward, or None.
        version: of the layer's state; raise it in a subclass whose state changed, and upgrade older
            states in :meth:`upgrade_state_dict`.
    """

    version: ClassVar[int] = 1
    host_buffers: ClassVar[frozenset[str]] = frozenset()
    """Buffers that stay NumPy arrays on any device."""

    params: dict[str, Array]
    grads: dict[str, Array]
    buffers: dict[str, Array]
    children: dict[str, Layer]
    _absent: set[str]
    _path: str
    training: bool
    device: str
    saved: Any

    def __init__(self) -> None:
        empty: dict[str, Any] = {"params": {}, "grads": {}, "buffers": {}, "children": {}}
        self.__dict__.update(
            empty, _absent=set(), _path="", device="cpu", training=True, saved=None
        )

    # ---- registering -----------------------------------------------------------------------------

    def register_parameter(self, name: str, array: ArrayLike | None) -> None:
        """Registers a trained array with a gradient of zeros; None registers the name as absent.

        Raises:
            ValueError: the name is empty, has a dot, or is taken.
            DTypeError: `array` is not an array, or not floating.
        """
        own = self._registered(name, array)
        if own is not None:
            if not is_floating(own.dtype):
                raise DTypeError(
                    f"{name} is {own.dtype}; a parameter is trained, so it is floating"
                )
            self.params[name] = own
            self.grads[name] = np.zeros_like(own)

    def register_buffer(self, name: str, array: ArrayLike | None) -> None:
        """Registers an untrained array of the state; None registers the name as absent.

        Raises:
            ValueError: the name is empty, has a dot, or is taken.
            DTypeError: `array` is not an array.
        """
        own = self._registered(name, array)
        if own is not None:
            self.buffers[name] = own

    def _registered(self, name: str, array: ArrayLike | None) -> Any:
        if not name or "." in name:
            raise ValueError(f"a name must not be empty or contain a dot, got {name!r}")
        if hasattr(self, name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}")
        if array is None:
            self._absent.add(name)
            return None
        return as_array(array, name)

    def _registered_value(self, name: str) -> Any:
        state = self.__dict__
        for kind in ("params", "buffers", "children"):
            if name in state.get(kind, ()):
                return state[kind][name]
        if name in state.get("_absent", ()):
            return None
        hint = "" if "params" in state else ": its __init__ must call super().__init__() first"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def _set(self, name: str, value: Any) -> None:
        if isinstance(value, Layer):
            self._set_child(name, value)
            return
        if isinstance(value, _CONTAINERS):
            self._check_seen(name, value)
        for kind in ("params", "buffers"):
            if name in self.__dict__.get(kind, ()):
                self._copy_into(name, self.__dict__[kind][name], value)
                return
        if name in self.__dict__.get("_absent", ()):
            if value is not None:
                raise ValueError(f"{type(self).__name__} has no {name}: it was registered as None")
            return
        self.__dict__.get("children", {}).pop(name, None)
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # with these, every misspelt attribute would exist
        __getattr__ = _registered_value
        __setattr__ = _set

    def _check_seen(self, name: str, value: Any) -> None:
        """Raises TypeError for a list of layers that are not children as well."""
        seen = [self]
        for layer in seen:
            seen += layer.children.values()
        if any(layer not in seen for layer in _layers_in(value)):
            raise TypeError(
                f"{type(self).__name__}.{name}: layers in a {type(value).__name__} would not be "
                "found (no state, no gradients): make it a cupybn.LayerList, or assign each layer "
                "to an attribute of its own"
            )

    def _copy_into(self, name: str, target: Array, value: Any) -> None:
        if value is target:
            return
        value = np.asarray(value) if isinstance(value, int | float) else as_array(value, name)
        if value.shape != target.shape:
            raise ShapeError(f"{name} has shape {target.shape}, cannot take one of {value.shape}")
        if value.dtype != target.dtype:
            raise DTypeError(f"{name} is {target.dtype}, cannot take {value.dtype}")
        assign(target, value)

    def _set_child(self, name: str, layer: Layer) -> None:
        if not name or "." in name:
            raise ValueError(f"a child's name must not be empty or contain a dot, got {name!r}")
        taken = (self.params, self.buffers, self._absent)
        if any(name in names for names in taken) or hasattr(type(self), name):
            raise ValueError(f"{type(self).__name__} already has an attribute {name!r}")
        if any(self is inner for _, inner in layer.named_layers()):
            raise ValueError(f"{name!r} contains this very layer: a tree cannot hold itself")
        self.__dict__.pop(name, None)
        self.children[name] = layer
        layer._set_path(f"{self.path}.{name}" if self.path else name)

    @property
    def path(self) -> str:
        """The path of this layer, where it was last attached: names from the root, with dots."""
        return self._path

    def _set_path(self, path: str) -> None:
        object.__setattr__(self, "_path", path)
        for name, child in self.children.items():
            child._set_path(f"{path}.{name}")

    # ---- forward and backward --------------------------------------------------------------------

    def compute_forward(self, x: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        """(y, context); implemented by every layer. Changes no state when it raises."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_forward")

    def compute_backward(self, dy: Any, context: Any, *args: Any, **options: Any) -> Any:
        """dx; adds the parameters' gradients to ``self.grads``. Implemented by every layer."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_backward")

    def forward(
        self, x: ArrayLike, *args: Any, save_for_backward: bool | None = None, **options: Any
    ) -> Array:
        """y; keeps the context in ``self.saved`` if `save_for_backward` (None: in training)."""
        save = self.training if save_for_backward is None else save_for_backward
        y: Array
        y, context = self.run_forward(x, save, *args, **options)
        if save:
            self.__dict__["saved"] = _EMPTY if context is None else context
        return y

    def __call__(self, *args: Any, **options: Any) -> Array:
        return self.forward(*args, **options)

    def run_forward(self, x: Any, save: bool, *args: Any, **options: Any) -> tuple[Any, Any]:
        """Calls ``compute_forward``, with ``save_for_backward`` if it declares that keyword.

        An exception gets a note that names the layer (in its text on Python 3.10).
        """
        if self._wants_save:
            options["save_for_backward"] = save
        try:
            return self.compute_forward(x, *args, **options)
        except Exception as error:
            self.say_where(error, "forward")
            raise

    _wants_save: ClassVar[bool] = False
    _takes_mask: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = signature(cls.compute_forward).parameters
        cls._wants_save = "save_for_backward" in parameters
        cls._takes_mask = "mask" in parameters

    def backward(self, dy: ArrayLike, saved: Any = None, **options: Any) -> Any:
        """Returns dx, from the context of the last saving forward or from the one passed in.

        The context is dropped unless backward raises. Gradients of parameters are added to
        ``self.grads``.

        Raises:
            RuntimeError: there is no context.
        """
        context = self.saved if saved is None else saved
        if context is None:
            error = RuntimeError(
                f"{self.label}: backward without a saved forward. Call forward first, in training "
                "mode or with save_for_backward=True; each backward uses up its forward"
            )
            self.leave_backward(error)
            raise error
        given = None if context is _EMPTY else context
        try:
            dx = self.compute_backward(dy, given, **options)
        except Exception as error:
            self.say_where(error, "backward")
            raise
        if self.saved is context:
            self.__dict__["saved"] = None
        return dx

    def leave_backward(self, error: Exception) -> bool:
        """Tells the ranks that wait in this tree's backward of the error; False if none would."""
        return any(child.leave_backward(error) for child in reversed(self.children.values()))

    def say_where(self, error: Exception, direction: str) -> None:
        """Adds the name of this layer to an error, unless a layer inside this one added its own."""
        with suppress(Exception):  # of an exception that takes no note, or has no text
            said = "\n".join([str(error), *getattr(error, "__notes__", ())])
            if any(f"{way} of " in said for way in ("forward", "backward")):
                return
            note = call_name(direction, self.label)
            if hasattr(error, "add_note"):
                error.add_note(note)
            elif error.args == (str(error),):
                error.args = (f"{error}\n{note}",)  # Python 3.10

    @property
    def label(self) -> str:
        """The name of this layer in errors: its path in the tree, or its class."""
        return self.path or type(self).__name__

    # ---- modes, walks and state ------------------------------------------------------------------

    def train(self: _Self, mode: bool = True) -> _Self:
        """Sets training mode, or evaluation mode, in the whole tree."""
        for _, layer in list(self.named_layers()):
            layer.training = bool(mode)
        return self

    def eval(self: _Self) -> _Self:
        """Sets evaluation mode in the whole tree."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Sets all gradients of the tree to zero, in place."""
        for _, grad in list(self.named_gradients()):
            with on_device_of(grad):
                grad[...] = 0

    def to(self: _Self, device: str | None = None, *, dtype: Any = None) -> _Self:
        """Moves the tree's arrays to "cpu", "cuda" or "cuda:<n>", or converts them, or both.

        Where arrays have to change, the layers get new ones; arrays that layers shared stay shared.
        Buffers in ``host_buffers`` stay on the host. None leaves the device, or the dtype, alone.
        A forward from before cannot go backward after a change.

        Args:
            device: where parameters, gradients and buffers go.
            dtype: float32 or float64, for all of them that are floating; sets a ``dtype`` that a
                layer keeps. Zero gradients stay zero; integers, such as counters, stay as they are.

        Raises:
            DeviceError: there is no such device, or CuPy is not installed.
            DTypeError: another dtype. Nothing has changed then.
        """
        place = None if device is None else check_device(device)
        wanted = None if dtype is None else check_layer_dtype(dtype)
        layers = [layer for _, layer in self.named_layers()]
        new: dict[int, Any] = {}
        for layer in layers:
            for name, array in [each for kind in layer._kinds() for each in kind.items()]:
                stays = place is None or name in layer.host_buffers
                new[id(array)] = _changed(array, None if stays else place, wanted)
        for layer in layers:
            for kind in layer._kinds():
                kind.update({name: new[id(array)] for name, array in kind.items()})
            layer.device = layer.device if place is None else place
            if wanted is not None and "dtype" in layer.__dict__:
                layer._set("dtype", wanted)
        return self

    def _kinds(self) -> tuple[dict[str, Array], ...]:
        return self.params, self.grads, self.buffers

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """(path, layer) of the tree, this one first; a shared layer once, under its first path."""
        seen: set[int] = set()
        for path, layer in self._walk(prefix):
            if id(layer) not in seen:
                seen.add(id(layer))
                yield path, layer

    def _walk(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        for name, value in self.__dict__.items():
            if type(value) in _CONTAINERS and name not in _OWN:
                self._check_seen(name, value)  # appended to a list since it was assigned?
        yield prefix, self
        for name, child in self.children.items():
            yield from child._walk(f"{prefix}.{name}" if prefix else name)

    def _named(self, kind: str) -> Iterator[tuple[str, Array]]:
        for path, layer in self.named_layers():
            for name, array in layer.__dict__[kind].items():
                yield (f"{path}.{name}" if path else name), array

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """(path, array) of the tree's parameters; those of a shared layer once."""
        return self._named("params")

    def named_gradients(self) -> Iterator[tuple[str, Array]]:
        """(path, array) of the tree's gradients, in the order of ``named_parameters``."""
        return self._named("grads")

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """(path, array) of the tree's buffers; those of a shared layer once."""
        return self._named("buffers")

    def reset_parameters(self) -> None:
        """Sets the tree's parameters to their initial values, where layers define them."""
        for child in self.children.values():
            child.reset_parameters()

    def reset_running_stats(self) -> None:
        """Sets the tree's running statistics to their initial values."""
        for child in self.children.values():
            child.reset_running_stats()

    def state_dict(self) -> StateDict:
        """Copies of all parameters and buffers by path, with the layers' versions as metadata."""
        return state_of(self._walk(""))

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> LoadResult:
        """Copies a state into the tree's arrays: all of it, or nothing when it raises.

        Args:
            state: from :meth:`state_dict`, or any mapping from path to array (NumPy, CuPy, or with
                DLPack, ``__cuda_array_interface__`` or ``__array__``), PyTorch's included.
            strict: whether missing and unexpected keys are errors. Shapes must fit in any case.

        Raises:
            StateDictError: lists everything that does not fit.
            TypeError: `state` is not a mapping.
        """
        return load_state(list(self._walk("")), state, strict)

    def upgrade_state_dict(self, state: dict[str, Any], prefix: str, version: int) -> None:
        """Edits a copy of a state that an older version of this class wrote.

        `prefix` goes before this layer's names in `state`: "" or a path with a trailing dot. A
        state without metadata counts as version 1.
        """

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"saved": None}

    def extra_repr(self) -> str:
        """The text in the parentheses of the repr, before the children."""
        return ""

    def __repr__(self) -> str:
        lines = [
            f"  ({name}): " + repr(child).replace("\n", "\n  ")
            for name, child in self.children.items()
        ]
        inside = self.extra_repr()
        if lines:
            inside = "\n".join([inside, *lines, ""] if inside else ["", *lines, ""])
        return f"{type(self).__name__}({inside})"
