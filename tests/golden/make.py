"""Makes the golden files; only for states that have none yet: python tests/golden/make.py

Those that are there are never made again: they stand for files that users have. ``pytorch`` needs
PyTorch, "formats" ml_dtypes, and all of them safetensors.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

import cupybn

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


def main() -> None:
    for make in (version_1, version_2, without_metadata, nested, formats, pytorch):
        for suffix in (".npz", ".safetensors"):
            path = FOLDER / f"{make.__name__}{suffix}"
            if not path.exists():
                cupybn.save(make(), path)
                print(path.name)


if __name__ == "__main__":
    main()
