"""The reference in docs/api: every public name is there, with an example that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import cupybn

PAGES = sorted((Path(__file__).resolve().parent.parent / "docs" / "api").glob("*.rst"))
MODULES = [
    "",
    "functional",
    "communicators",
    "distributed",
    "errors",
    "testing",
    "typing",
    "interop.names",
    "interop.jax",
    "interop.torch",
]
INTERNAL = {  # public by their spelling alone: for other modules, or what a table is made of
    "cupybn.distributed": {"allreduce_arrays", "broadcast_arrays", "outline", "verify_arrays"},
    "cupybn.interop.names": {"Convention"},
}
FRAMEWORKS = {"cupybn.interop.jax": "jax", "cupybn.interop.torch": "torch"}
DIRECTIVE = re.compile(r"^\.\. (?:py:)?(current|auto)(\w+):: (\S+)$", re.MULTILINE)


def public_names(module):
    """``__all__``, or what the module defines under a name without an underscore."""
    if hasattr(module, "__all__"):
        return {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    own |= {"ArrayLike"} if module is cupybn.typing else set()
    return own - INTERNAL.get(module.__name__, set())


def described(page):
    """{(the full name that a directive has, or its last part): what stands below it}."""
    text = page.read_text()
    found = list(DIRECTIVE.finditer(text))
    module, entries = "", {}
    ends = [each.start() for each in found[1:]] + [len(text)]
    for this, end in zip(found, ends[: len(found)], strict=True):
        kind, what, name = this.groups()
        if what == "module":
            module = name
        elif kind == "auto":
            full = name if name.startswith("cupybn.") else f"{module}.{name}"
            entries[full] = text[this.end() : end]
    return entries


ENTRIES = {name: text for page in PAGES for name, text in described(page).items()}


def found(full):
    """What an entry is of; None where its framework is not installed."""
    module, _, name = full.rpartition(".")
    if module in FRAMEWORKS and not find_spec(FRAMEWORKS[module]):
        return None
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", MODULES)
def test_every_public_name_has_an_entry_and_an_example(path):
    full = f"cupybn.{path}".removesuffix(".")
    if full in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[full])
    names = public_names(importlib.import_module(full))
    assert len(names) > 1 or path == "interop.names"
    for name in names:
        thing = getattr(importlib.import_module(full), name)
        texts = [text for place, text in ENTRIES.items() if found(place) is thing]
        assert len(texts) == 1, f"{full}.{name} has {len(texts)} entries in docs/api"
        assert ">>>" in texts[0], f"{full}.{name} has no example"


def test_every_entry_is_of_a_public_name():
    for full in ENTRIES:
        module, _, name = full.rpartition(".")
        if found(full) is not None:
            assert name in public_names(importlib.import_module(module)), full
    assert len(ENTRIES) > 75


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_run(page, tmp_path, monkeypatch):
    if page.stem in ("jax", "torch"):
        pytest.importorskip(page.stem)
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed, tried = runner.run(examples, out=said.append)
    assert failed == 0, "".join(said)
    assert tried > 2 or page.stem == "index"


def test_nothing_is_missing_from_the_list_of_modules():
    """Those that `cupybn` shows, and those of interop that are no package's inner part."""
    shown = {name for name in cupybn.__all__ if inspect.ismodule(getattr(cupybn, name))}
    assert shown <= set(MODULES)
    interop = Path(cupybn.__file__).parent / "interop"
    inner = {f"interop.{path.stem}" for path in interop.iterdir() if not path.stem.startswith("_")}
    assert inner <= set(MODULES)


def explained(thing, seen=()):
    """Its docstring, and those of this library that it refers to."""
    text = inspect.getdoc(thing) or ""
    for kind, name in re.findall(r":(func|class|mod):`~?([\w.]+)`", text):
        if (kind, name) in seen or ("." in name and not name.startswith("cupybn.")):
            continue
        module = importlib.import_module(getattr(thing, "__module__", "cupybn"))
        if kind == "mod":
            other = importlib.import_module(name)
        elif "." in name:
            path, _, last = name.rpartition(".")
            other = getattr(importlib.import_module(path), last, None)
        else:
            other = getattr(module, name, None)
        text += explained(other, (*seen, (kind, name)))
    return text


def has_errors(thing):
    """Whether users call it with arguments: a function, or a class to construct."""
    if inspect.isfunction(thing):
        return True
    if not inspect.isclass(thing) or issubclass(thing, (Exception, tuple, dict)):
        return False  # errors, results, containers
    if thing is cupybn.functional.Saved or getattr(thing, "_is_protocol", False):
        return False  # the library makes them
    return bool(inspect.signature(thing).parameters)


@pytest.mark.parametrize("full", sorted(ENTRIES))
def test_every_parameter_is_explained_and_every_error(full):
    """In its own docstring, or in one that this refers to."""
    thing = found(full)
    if thing is None:
        pytest.skip(f"{full} needs a framework that is not installed")
    if not has_errors(thing):
        return
    text = explained(thing)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in inspect.signature(thing).parameters.items():
        assert parameter.kind in variable or re.search(rf"\b{name}\b", text), name
    assert re.search(r"[Rr]aises?\b|[Aa]s :func:|see\s:mod:|[Ee]rrors\b.* are", text), "which?"


def shown_members(full):
    """The members that an entry shows, by their names."""
    listed = re.search(r"^ +:members:(.*)$", ENTRIES[full], re.MULTILINE)
    thing = found(full)
    if listed is None or thing is None:
        return []
    named = [name for name in re.split(r"[, ]+", listed[1].strip()) if name]
    excluded = re.search(r"^ +:exclude-members:(.*)$", ENTRIES[full], re.MULTILINE)
    hidden = set(re.split(r"[, ]+", excluded[1])) if excluded else set()
    return named or [name for name in vars(thing) if name[0] != "_" and name not in hidden]


@pytest.mark.parametrize("full", sorted(ENTRIES))
def test_every_member_that_is_shown_is_explained(full):
    """Sphinx leaves out what has no docstring."""
    for name in shown_members(full):
        member = inspect.getattr_static(found(full), name)
        assert len((inspect.getdoc(member) or "").split()) > 1, name


def test_the_sources_of_the_formulas_are_named():
    assert "Ioffe and Szegedy" in cupybn.functional.__doc__
    assert "Chan" in cupybn.functional.Moments.merge.__doc__
    assert "double_backward.py" in cupybn.functional.batch_norm_double_backward.__doc__
    for layer in (cupybn.BatchNorm1d, cupybn.BatchNorm2d, cupybn.BatchNorm3d, cupybn.SyncBatchNorm):
        assert ":mod:`cupybn.functional`" in layer.__doc__
