"""Makes the golden files; only for states that have none yet: python tests/golden/make.py

Those that are there are never made again: they stand for files that users have. ``pytorch`` and
``module`` need PyTorch, "formats" ml_dtypes, and all of them safetensors.

Besides states there are whole objects as ``pickle`` and ``torch.save`` write them: ``layer``,
``net`` and ``module``, made by the code of commit a71c31a after two steps of training. Beside each
stands a file ``<name>_arrays.npz``: the arrays that were in it ("kept"), the batches of two more
steps ("x") and the arrays after these ("trained").
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

import cupybn
from cupybn.interop import torch as interop

FOLDER = Path(__file__).resolve().parent


def version_1():
    """A batch norm before version 2: no num_batches_tracked."""
    return cupybn.StateDict(
        {
            "weight": np.float32([0.5, -1.25, 2.0]),
            "bias": np.float32([1.0, 0.0, -3.5]),
            "running_mean": np.float32([0.125, -7.0, 1e-3]),
            "running_var": np.float32([4.0, 0.0625, 1e3]),
        },
        metadata={"": {"version": 1}},
    )


def version_2():
    """A batch norm of version 2."""
    state = cupybn.StateDict(version_1(), metadata={"": {"version": 2}})
    state["num_batches_tracked"] = np.array(12345678901)
    return state


def without_metadata():
    """What other programs write: version 1, and nothing that says so."""
    return dict(version_1())


def nested():
    """A tree with layers of both versions."""
    state = cupybn.StateDict(
        metadata={
            "": {"version": 1},
            "stem": {"version": 2},
            "blocks": {"version": 1},
            "blocks.0": {"version": 1},
        }
    )
    state.update({f"stem.{name}": array for name, array in version_2().items()})
    state.update({f"blocks.0.{name}": 2 * array for name, array in version_1().items()})
    return state


def formats():
    """Everything that files of format 1 hold."""
    counts = np.arange(-2, 4).reshape(2, 3)
    names = ["?", "i1", "u1", "<i2", ">i2", "<u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8"]
    names += ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]
    state = cupybn.StateDict(metadata={"a/b": {"text": "ü", "list": [1, 2.5, None, True]}})
    state.update({f"of {name}": counts.astype(name) for name in names})
    state["of bfloat16"] = counts.astype(ml_dtypes.bfloat16)
    state["transposed"] = np.arange(6.0).reshape(2, 3).T
    state["empty"] = np.empty((0, 2), np.float32)
    state["größe/名"] = np.array(1.5)
    return state


def pytorch():
    """PyTorch's own, after one step: batch mean 2, 4, 6, unbiased variance 2, 8, 18."""
    module = torch.nn.Sequential(
        OrderedDict(
            bn=torch.nn.BatchNorm1d(3),
            block=torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False)),
        )
    )
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    module.bn(x)
    module.block(x)
    return module.state_dict()


# ---- whole objects -------------------------------------------------------------------------------


def layer():
    """A BatchNorm2d."""
    made = cupybn.BatchNorm2d(3, momentum=0.2, activation="relu")
    made.weight = np.float32([0.5, -1.25, 2.0])
    made.bias = np.float32([0.25, 0.0, -0.5])
    return made


def net():
    """A tree with layers made synchronised, converted, and not synchronised."""
    comm = cupybn.SelfCommunicator()
    inner = cupybn.Sequential(
        cupybn.BatchNorm2d(3),
        cupybn.SyncBatchNorm(3, momentum=None, affine=False, comm=comm, name="named"),
    )
    converted = cupybn.convert_sync_batchnorm(cupybn.BatchNorm2d(3, eps=1e-3, bias=False), comm)
    return cupybn.Sequential({"inner": inner, "layer": layer(), "converted": converted})


def module():
    """A PyTorch module with batch norms of cupybn.interop.torch."""
    comm = cupybn.SelfCommunicator()
    made = torch.nn.Sequential(
        OrderedDict(
            conv=torch.nn.Conv2d(3, 4, 2),
            bn=interop.BatchNorm2d(4, momentum=None),
            relu=torch.nn.ReLU(),
            sync=interop.SyncBatchNorm(4, comm=comm, name="named"),
        )
    )
    with torch.no_grad():
        made.conv.weight.copy_(torch.linspace(-1, 1, 48).view(4, 3, 2, 2).sin())
        made.conv.bias.zero_()
    return made


def step(made: Any, x: Any) -> Any:
    """One step of gradient descent on ``sum(y**2 - y)``; returns y."""
    y = made.forward(x)
    made.zero_grad()
    made.backward(2 * y - 1)
    for (_, parameter), (_, gradient) in zip(
        made.named_parameters(), made.named_gradients(), strict=True
    ):
        parameter -= np.float32(0.01) * gradient
    return y


def torch_step(made: Any, x: Any) -> Any:
    """The same for a module."""
    y = made(torch.from_numpy(x))
    made.zero_grad()
    (y**2 - y).sum().backward()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter -= 0.01 * parameter.grad
    return y.detach().numpy()


def arrays(made: Any) -> dict[str, Any]:
    """Copies of parameters, buffers and a layer's gradients; PyTorch does not save gradients."""
    if isinstance(made, torch.nn.Module):
        return {name: np.copy(tensor.numpy()) for name, tensor in made.state_dict().items()}
    gradients = {f"gradient of {name}": grad.copy() for name, grad in made.named_gradients()}
    return made.state_dict() | gradients


def make_object(make: Callable[[], Any], suffix: str, write: Any, train: Any) -> None:
    path = FOLDER / f"{make.__name__}{suffix}"
    if path.exists():
        return
    batches = np.sin(np.arange(4 * 4 * 3 * 5 * 5, dtype=np.float32) * 0.7).reshape(4, 4, 3, 5, 5)
    made = make()
    for x in batches[:2]:
        train(made, x)
    with path.open("wb") as file:
        write(made, file)
    kept = arrays(made)
    y = [train(made, x) for x in batches[2:]]
    np.savez(
        FOLDER / f"{make.__name__}_arrays.npz",
        x=batches[2:],
        y=y,
        **{f"kept {name}": array for name, array in kept.items()},
        **{f"trained {name}": array for name, array in arrays(made).items()},
    )
    print(path.name)


def main() -> None:
    make_object(layer, ".pickle", pickle.dump, step)
    make_object(net, ".pickle", pickle.dump, step)
    make_object(module, ".pt", torch.save, torch_step)
    for make in (version_1, version_2, without_metadata, nested, formats, pytorch):
        for suffix in (".npz", ".safetensors"):
            path = FOLDER / f"{make.__name__}{suffix}"
            if not path.exists():
                cupybn.save(make(), path)
                print(path.name)


if __name__ == "__main__":
    main()
