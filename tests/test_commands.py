"""The commands in the documents name targets, scripts, modules and options that are there."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module

import pytest
from test_docs import DOCUMENTS, ROOT

from benchmarks import SECTIONS
from benchmarks.__main__ import argument_parser
from cupybn import cli

PROGRAMS = r"make|python|torchrun|mpiexec|timeout|srun|\S+/bin/\w+|tests/\S+\.sh"
THE_READERS_OWN = {"train.py", "script.py"}


def commands(path):
    """What a page tells to type: lines of its blocks, code between words, captions of scripts."""
    text = path.read_text().replace("\\\n", " ")
    fences = re.compile(r"^```(.*)\n((?:.*\n)*?)```", re.MULTILINE)
    blocks = [body for language, body in fences.findall(text) if not language.startswith("python")]
    lines = "".join(blocks).splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", fences.sub("", text))]
    lines += re.findall(r':caption: "\w+: (.*)"', text)
    lines = [re.sub(r"^\$ | # .*| &$", "", line).strip() for line in lines]
    return [line for line in lines if re.match(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS})\s\S", line)]


def refuses(parser, words):
    try:
        parser.parse_args(words)
    except SystemExit:
        return True
    return False


def wrong_module(name, words):
    """What is wrong about ``python -m NAME WORDS...``, for modules of this repository."""
    if name == "cupybn" and words:
        if words[0] not in cli.COMMANDS:
            return words[0]
        parser = argparse.ArgumentParser()
        import_module(f"cupybn.cli.{words[0]}").add_arguments(parser)
        return " ".join(words) if refuses(parser, words[1:]) else None
    if name == "benchmarks":
        if refuses(argument_parser(), words):
            return " ".join(words)
        unknown = set(argument_parser().parse_args(words).sections) - set(SECTIONS)
        return unknown.pop() if unknown else None
    if name.startswith("benchmarks."):
        return None if (ROOT / f"{name.replace('.', '/')}.py").is_file() else name
    return None


def wrong_script(name, words):
    """What is wrong about a script and what follows it: options, or the step of a shell script."""
    if name in THE_READERS_OWN:
        return None
    if not (ROOT / name).is_file():
        return name
    source = (ROOT / name).read_text()
    named = words[:1] if name.endswith(".sh") else [w for w in words if w.startswith("--")]
    return next((word for word in named if word not in source), None)


def wrong(command):
    """What a command names that is not there; None where all is."""
    words = shlex.split(command)
    if "sh" in words:  # mpiexec ... sh -c '...'
        words = shlex.split(words[words.index("-c") + 1])
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((target for target in targets if target not in known), None)
    for n, word in enumerate(words):
        if words[n - 1] == "-m" and word not in ("mpi4py", "pytest"):
            return wrong_module(word, words[n + 1 :])
        if re.fullmatch(r"[\w/]+\.(py|sh)", word):
            return wrong_script(word, [] if "pytest" in words else words[n + 1 :])
    return None


COMMANDS = [(path, command) for path in DOCUMENTS for command in dict.fromkeys(commands(path))]


@pytest.mark.parametrize("path, command", COMMANDS, ids=lambda p: getattr(p, "name", p))
def test_a_command_names_what_is_there(path, command):
    assert wrong(command) is None


def test_the_commands_are_found():
    found = {command for _, command in COMMANDS}
    assert len(found) > 60
    for command in (
        "make demo",
        "mpiexec -n 4 python -m cupybn selftest",
        "mpiexec -n 4 sh -c 'python -m mpi4py train.py || { code=$?; sleep 630; exit $code; }'",
        "torchrun --nproc-per-node 2 examples/ddp_after.py",
        "tests/on_gpu.sh why FOLDER",
        "REHEARSE=1 tests/on_gpu.sh first FOLDER",
        "python -m benchmarks kernels --shapes 32x64x112x112 --layouts columns",
        ".venv/bin/python -m pytest tests/test_sync.py -k empty",
    ):
        assert command in found


@pytest.mark.parametrize(
    "command",
    [
        "make tests",
        "python -m cupybn benchmark",
        "mpiexec -n 4 python -m cupybn info --jsn",
        "python -m cupybn compile --dtypes float8",
        "python -m benchmarks cpus",
        "python -m benchmarks cpu --shape",
        "python -m benchmarks.models",
        "mpiexec -n 2 python -m mpi4py examples/missing.py",
        "python examples/train_digits.py --timings",
        "mpiexec -n 2 sh -c 'python examples/missing.py'",
        ".venv/bin/python -m pytest tests/test_missing.py -k empty",
        "tests/on_gpu.sh fourth FOLDER",
    ],
)
def test_a_wrong_command_is_noticed(command):
    assert wrong(command)
