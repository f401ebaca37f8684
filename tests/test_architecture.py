"""The shape of the house: imports lead to earlier layers, files and functions stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cupybn"
LAYERS = [
    ["__version__"],
    ["errors", "typing"],
    ["arrays", "launcher"],
    ["layout"],
    ["statistics", "checks"],
    ["backends"],
    ["communicators", "checkpoint"],
    ["collective"],
    ["forward_backward"],
    ["double_backward", "primitives"],
    ["functional"],
    ["layers"],
    ["distributed", "calibration", "testing"],
    ["interop"],
    ["cli"],
    ["__main__"],
]
"""The modules and packages of cupybn; each imports from earlier lines, and from itself."""

STATEMENTS = 8562
LONGEST_FUNCTION = 60  # lines
MOST_PARAMETERS = 8  # positional ones
COMPILED = "backends/cpu/"  # loops in Numba, whose arguments are arrays and scalars

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def module_of(path):
    """("layers", "base") for layers/base.py, ("layers",) for layers/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in FILES}


def imports_of(path):
    """What a file imports of this package, wherever in it the import stands.

    A module is (its path), a name that a module defines (the module's path, the name).
    """
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
            yield from (name[1:] for name in names if name[0] == "cupybn")
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                here = path.relative_to(PACKAGE).parent.parts
                module = here[: len(here) - node.level + 1] + module
            elif module[:1] == ("cupybn",):
                module = module[1:]
            else:
                continue
            yield from ((*module, alias.name) for alias in node.names)


def test_every_import_is_seen(tmp_path, monkeypatch):
    source = """
from __future__ import annotations
import numpy, cupybn.errors
from . import state
from .. import backends
from ..arrays import Array
from ..interop.torch import modules
from cupybn.layout import Layout
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from .convert import convert_sync_batchnorm
def late():
    from ..cli.info import run
"""
    path = PACKAGE / "layers" / "invented.py"
    monkeypatch.setitem(TREES, path, ast.parse(source))
    assert sorted(imports_of(path)) == [
        ("arrays", "Array"),
        ("backends",),
        ("cli", "info", "run"),
        ("errors",),
        ("interop", "torch", "modules"),
        ("layers", "convert", "convert_sync_batchnorm"),
        ("layers", "state"),
        ("layout", "Layout"),
    ]


def test_every_module_has_its_layer():
    assert {module[0] for module in MODULES if module} == set(chain(*LAYERS)) - {"__version__"}


@each_file
def test_imports_lead_to_earlier_layers(path):
    order = {name: i for i, names in enumerate(LAYERS) for name in names}
    if not module_of(path):  # the package itself shows what all of them have
        return
    own = module_of(path)[0]
    for other in {imported[0] for imported in imports_of(path)} - {own}:
        assert order[other] < order[own], f"{own} imports {other}"


def test_no_circles():
    """Between files: neither a package's own modules nor the package and one of them."""

    def file_of(imported):
        for end in range(len(imported), 0, -1):
            if imported[:end] in MODULES:
                return imported[:end]
        return None

    graph = {
        module: {file_of(imported) for imported in imports_of(path)} - {None, module}
        for module, path in MODULES.items()
    }
    ends = {None}
    while ends:  # those that import no other, and those that no other imports
        imported = set().union(*graph.values())
        ends = {m for m, others in graph.items() if not others & graph.keys() or m not in imported}
        graph = {module: others for module, others in graph.items() if module not in ends}
    assert not graph, ", ".join(".".join(module) for module in graph)


def functions_of(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(TREES[path]) if isinstance(node, kinds)]


@each_file
def test_functions_are_short(path):
    for function in functions_of(path):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= LONGEST_FUNCTION, f"{function.name} has {lines} lines"


@each_file
def test_functions_take_few_positional_parameters(path):
    if str(path.relative_to(PACKAGE)).startswith(COMPILED):
        return
    for function in functions_of(path):
        given = [each.arg for each in function.args.posonlyargs + function.args.args]
        given = [name for name in given if name not in ("self", "cls")]
        assert len(given) <= MOST_PARAMETERS, f"{function.name}{tuple(given)}"


@each_file
def test_nothing_is_kept_from_the_formatter(path):
    assert "fmt: " + "skip" not in path.read_text()
    assert "fmt: " + "off" not in path.read_text()


def test_the_package_stays_small():
    nodes = chain.from_iterable(ast.walk(tree) for tree in TREES.values())
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= STATEMENTS


def test_every_module_can_be_imported():
    """Some are imported by few: in each supported Python, all of them have to be importable."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or ""
        if missing.partition(".")[0] not in {"cupy", "jax", "llvmlite", "numba", "torch"}:
            raise
"""
    names = [".".join(("cupybn", *module)) for module in sorted(MODULES)]
    command = [sys.executable, "-W", "error", "-c", code, *names]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_importing_is_light():
    code = (
        "import sys, cupybn, cupybn.testing;"
        "heavy = ('cupy', 'mpi4py', 'numba', 'torch', 'safetensors', 'ml_dtypes');"
        "print([m for m in heavy if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"


def test_everything_public_is_documented():
    import inspect

    import cupybn

    for module in (cupybn, cupybn.functional, cupybn.communicators, cupybn.distributed):
        for name in module.__all__ if hasattr(module, "__all__") else ():
            thing = getattr(module, name)
            assert inspect.getdoc(thing), name
            for member, value in vars(thing).items() if inspect.isclass(thing) else ():
                if inspect.isfunction(value) and not member.startswith("_"):
                    assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"
