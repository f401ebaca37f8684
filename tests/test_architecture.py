"""The house keeps its shape: imports go down, and importing the library stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "cupybn"
FLOORS = [
    {"errors", "arrays", "layout", "launcher", "__version__"},
    {"statistics", "checks", "checkpoint", "communicators"},
    {"backends", "joint"},
    {"coalesce", "passes", "double_backward", "primitives", "functional"},
    {"layers"},
    {"calibration", "distributed", "testing"},
    {"interop"},
    {"cli"},
    {"__main__"},
]
MAY_IMPORT_BESIDE = {
    ("arrays", "errors"),
    ("layout", "arrays"),
    ("layout", "errors"),
    ("functional", "passes"),
    ("functional", "double_backward"),
    ("functional", "coalesce"),
    ("functional", "primitives"),
    ("double_backward", "passes"),
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.split(".")[0] for name in names)
        assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cupybn"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_go_to_lower_floors_only(path):
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path):
        below = floor[other] < floor[room]
        assert below or other == room or (room, other) in MAY_IMPORT_BESIDE, f"{room} -> {other}"


def test_every_module_can_be_imported():
    """Some are imported by few: in each supported Python, all of them have to be importable."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or ""
        if missing.partition(".")[0] not in {"cupy", "numba", "torch"}:
            raise
"""
    names = [".".join(path.parts).removesuffix(".__init__") for path in sorted(paths)]
    command = [sys.executable, "-W", "error", "-c", code, *names]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_importing_is_light():
    code = (
        "import sys, cupybn, cupybn.testing;"
        "heavy = ('cupy', 'mpi4py', 'numba', 'torch', 'safetensors', 'ml_dtypes');"
        "print([m for m in heavy if m in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
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
