"""The command line."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
from conftest import rank_environment

import cupybn
from cupybn.cli import COMMANDS, main


def cli(*arguments, check=True):
    return subprocess.run(
        [sys.executable, "-m", "cupybn", *arguments],
        env=rank_environment(), capture_output=True, text=True, check=check, timeout=60,
    )  # fmt: skip


def test_without_a_command_it_says_which_there_are():
    process = cli(check=False)
    assert process.returncode == 2
    assert all(name in process.stderr for name in COMMANDS)
    assert cli("--version").stdout.strip() == f"cupybn {cupybn.__version__}"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_and_is_imported_alone(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert COMMANDS[name] in " ".join(capsys.readouterr().out.split())
    code = (
        f"import sys; from cupybn.cli import main\ntry: main([{name!r}, '--help'])\n"
        "except SystemExit: pass\nprint(sorted(m for m in sys.modules if m[:11] == 'cupybn.cli.'))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    others = [f"cupybn.cli.{other}'" for other in COMMANDS if other != name]
    assert f"cupybn.cli.{name}" in process.stdout.splitlines()[-1]
    assert not any(other in process.stdout.splitlines()[-1] for other in others)


def test_info():
    found = json.loads(cli("info", "--json").stdout)
    assert found["cupybn"] == cupybn.__version__
    assert platform.python_version() in cli("info").stdout
