"""What texts tell a user to type works as it is printed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
NOT_OURS = {  # in no extra
    "flax", "impi-rt", "jax", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "torch",
}  # fmt: skip
REQUIRED, _, OPTIONAL = PROJECT.partition("\n[tool.")[0].partition("optional-dependencies]")
EXTRAS = set(re.findall(r"^(\w+) = \[", OPTIONAL, re.MULTILINE))
PACKAGES = set(re.findall(r"\"([\w-]+)", REQUIRED.partition("\ndependencies = ")[2] + OPTIONAL))
FOLDERS = ("cupybn", "cuda", "examples", "benchmarks", "tests", "docs", ".ci")
SUFFIXES = {".py", ".md", ".sh", ".cu", ".cuh", ""}
FILES = [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"] + [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
]


def texts(path):
    """The strings of a program, put together as Python does; a document with its lines joined."""
    text = path.read_text()
    if path.suffix != ".py":
        return [" ".join(text.split())]
    return [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant | ast.JoinedStr)
        for parts in [node.values if isinstance(node, ast.JoinedStr) else [node]]
    ] + re.findall(r"# .*", text)


def advised(text):
    """The first thing that each ``pip install`` in a text is given, without options."""
    for rest in re.findall(r"pip install ([^`\n;:()]*)", text):
        words = [word.strip(",'\"") for word in rest.split() if not word.startswith("-")]
        assert words, text
        yield words[0] if words[0] == "." else words[0].rstrip(".")


def test_the_texts_are_found(tmp_path):
    """Also where a string is divided in the source, and in an f-string."""
    program = tmp_path / "program.py"
    program.write_text(
        "f'{1} is missing: pip install ' f\"'cupybn[\" 'cpu]' if 1 else 'x'\n# a b\n"
    )
    assert "{} is missing: pip install 'cupybn[cpu]" in texts(program)
    assert list(advised("run pip install -q 'numba>=0.61', or")) == ["numba>=0.61"]
    assert list(advised("`pip install '.[cpu]'` and `pip install .`")) == [".[cpu]", "."]
    assert len(FILES) > 150
    assert {"cpu", "mpich", "examples"} < EXTRAS
    assert {"numba", "mpich", "cupy-cuda13x", "safetensors"} < PACKAGES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pip_is_told_of_packages_that_are_there(path):
    """cupybn is not on PyPI: its extras come from the checkout, as '.[cpu]'."""
    if path == Path(__file__).resolve():
        return
    for text in texts(path):
        assert not re.search(r"pip install[^`;]*cupybn\[", text), text
        for first in advised(text):
            if path.name in ("Makefile", "pythons") or "{" in first or "$" in first:
                continue  # the tests run those
            extras = re.fullmatch(r"\.\[([\w,]+)\]", first)
            if extras:
                assert set(extras[1].split(",")) <= EXTRAS, text
            else:
                name = re.split(r"[<>=]", first)[0]
                assert name in PACKAGES | NOT_OURS or first == ".", text


def test_make_is_told_of_targets_that_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for command in re.findall(
            r"(?:`make |^make (?=\S+ +#))((?:[A-Z]+=\S+ )*)([\w-]+)", path.read_text(), re.M
        ):
            assert command[1] in targets, command


def test_the_readme_names_the_extras_that_there_are():
    text = (ROOT / "README.md").read_text()
    for extras in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(extras.split(",")) <= EXTRAS
