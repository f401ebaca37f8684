"""The table of docs/embedding.md: what PyTorch's own do, and that each row has a test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import distributed  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_checks import DOUBLE, seeded, tensor  # noqa: E402

from cupybn import SelfCommunicator  # noqa: E402
from cupybn.interop import torch as interop  # noqa: E402
from cupybn.testing import run_ranks  # noqa: E402

TESTS = Path(__file__).parent
ALONE = SelfCommunicator()
SHAPE = (4, 3, 2, 2)
PLAIN, OURS = torch.nn.BatchNorm2d, interop.SyncBatchNorm


def rows():
    """(what, nn.BatchNorm2d, torch's SyncBatchNorm, ours, tests) of each row."""
    text = (TESTS.parent / "docs" / "embedding.md").read_text()
    table = text.partition("### What the three can do\n")[2].partition("\n### ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names_of(path):
    """The tests of a file, without those that never run or are expected to fail."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = " ".join(map(ast.unparse, node.decorator_list))
            if not re.search(r"mark\.(skip|xfail)\b", marks):
                yield node.name


def test_each_row_of_the_table_has_a_test():
    known = {name for path in TESTS.glob("test_torch*.py") for name in names_of(path)}
    found = rows()
    assert len(found) > 35
    for what, *_, tests in found:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names, what
        assert set(names) <= known, what


def test_only_pytorchs_synchronised_one_refuses_the_cpu_and_has_counted_by_then():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for module in (PLAIN(3), OURS(3, comm=ALONE), torch.nn.SyncBatchNorm(3)):
            if isinstance(module, torch.nn.SyncBatchNorm):
                with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
                    module(torch.randn(SHAPE))
            else:
                module(torch.randn(SHAPE)).sum().backward()
            assert module.num_batches_tracked == 1
            module.eval()(torch.randn(SHAPE))
    finally:
        distributed.destroy_process_group()


def derivatives(module, order):
    x = tensor(SHAPE, 1).requires_grad_()
    value = module(x).pow(3).sum()
    for _ in range(order):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.pow(2).sum()
    return gradient


def test_derivatives_are_pytorchs_up_to_the_second():
    for order in (1, 2):
        theirs, ours = (derivatives(seeded(cls, 3), order) for cls in (PLAIN, interop.BatchNorm2d))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    kinds = [PLAIN, interop.BatchNorm2d]
    if torch.__version__ < (2, 14):
        assert derivatives(seeded(kinds.pop(0), 3), 3).isfinite().all()
    for kind in kinds:
        with pytest.raises(RuntimeError, match="third|3rd"):
            derivatives(seeded(kind, 3), 3)


def test_a_checkpoint_of_pytorchs_counts_twice():
    contexts = {"context_fn": interop.recompute_contexts}
    for module, options, counted in ((PLAIN(3), {}, 2), (OURS(3, comm=ALONE), contexts, 1)):
        x = torch.randn(SHAPE, requires_grad=True)
        checkpoint(module, x, use_reentrant=False, **options).sum().backward()
        assert module.num_batches_tracked == counted


def test_pytorchs_moves_its_counter_before_an_error():
    for cls, counted in ((PLAIN, 1), (interop.BatchNorm2d, 0)):
        module = cls(3)
        with pytest.raises((RuntimeError, ValueError)):
            module(torch.randn(4, 5, 2, 2))  # five channels
        assert module.num_batches_tracked == counted


def test_all_take_an_empty_batch_of_which_pytorchs_is_counted():
    for module, counted in ((PLAIN(3, dtype=DOUBLE), 1), (OURS(3, comm=ALONE, dtype=DOUBLE), 0)):
        assert module(tensor((0, 3, 2, 2), 0)).shape == (0, 3, 2, 2)
        assert module.num_batches_tracked == counted


def test_several_gradients_at_once_on_one_rank_and_not_over_ranks():
    def batched(module):
        x = tensor(SHAPE, 1).requires_grad_()
        y = module(x)
        dys = torch.stack([tensor(SHAPE, seed) for seed in (2, 3)])
        return torch.autograd.grad(y, x, dys, is_grads_batched=True)[0]

    theirs, ours = batched(seeded(PLAIN, 3)), batched(seeded(OURS, 3, comm=ALONE))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    def refused(comm):
        with pytest.raises(RuntimeError, match="do not go over ranks: call backward once for each"):
            batched(seeded(OURS, 3, comm=comm))

    run_ranks(2, refused, timeout=20)


# Run by a process of its own, because what is imported stays so.
VERSIONS = """
import sys
import torch

def told():
    for name in [name for name in sys.modules if name.startswith("cupybn.interop.torch")]:
        del sys.modules[name]
    try:
        import cupybn.interop.torch
    except ImportError as error:
        print(error)

torch.__version__ = type(torch.__version__)("2.12.1")
told()
torch.__version__ = type(torch.__version__)("2.99.0")
kept = torch._C._len_torch_dispatch_stack
del torch._C._len_torch_dispatch_stack  # a later version may lack a private name,
told()
torch._C._len_torch_dispatch_stack = kept
del torch._subclasses.FakeTensor  # or have it elsewhere
told()
"""


def test_other_versions_of_pytorch_are_told_by_name():
    """What is before the range, and what is behind it and lacks something that is asked of it."""
    process = subprocess.run(
        [sys.executable, "-c", VERSIONS], cwd=TESTS.parent, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    old, lacking, elsewhere = process.stdout.splitlines()
    start = "cupybn.interop.torch is for PyTorch 2.13 and 2.14 (tested with "
    for text, version in ((old, "2.12.1"), (lacking, "2.99.0"), (elsewhere, "2.99.0")):
        assert text.startswith(start), text
        assert f"and this is PyTorch {version}" in text
    assert old.endswith(": pip install 'torch>=2.13'")
    assert "which lacks what is needed: " in lacking
    assert "_len_torch_dispatch_stack" in lacking
    assert "cannot import name 'FakeTensor'" in elsewhere
