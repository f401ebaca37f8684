"""The command line."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rank_environment
from cuda_tools import need
from ptx.launch import missing

import cupybn
from cupybn.cli import COMMANDS, main


def cli(*arguments, check=True, env=None):
    return subprocess.run(
        [sys.executable, "-m", "cupybn", *arguments],
        env=rank_environment(**(env or {})),
        capture_output=True,
        text=True,
        check=check,
        timeout=250,
    )


def test_without_a_command_it_says_which_there_are():
    process = cli(check=False)
    assert process.returncode == 2
    assert all(name in process.stderr for name in COMMANDS)
    assert cli("--version").stdout.strip() == f"cupybn {cupybn.__version__}"


def test_where_the_bench_is_now():
    process = cli("bench", "--cpu", check=False)
    assert process.returncode == 2
    assert process.stderr.endswith(
        "error: the bench is in the checkout: run python -m benchmarks there\n"
    )


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
    assert found["cupybn"].startswith(cupybn.__version__)
    assert found["cpu_backend"].startswith(("numpy", "numba"))
    assert found["ranks"] == 1
    assert found["transport"] == "pinned for CuPy arrays, host for NumPy arrays"
    assert found["cuda_aware_mpi"] is False
    assert "MPIX_Query_cuda_support() = 0" in found["cuda_aware_how"]
    table = cli("info").stdout
    assert platform.python_version() in table
    assert "CUDA-aware MPI  no\n" in table
    found = json.loads(cli("info", "--json", env={"CUPYBN_CUDA_AWARE_MPI": "1"}).stdout)
    assert found["transport"].startswith("device for CuPy arrays")
    assert found["cuda_aware_how"] == "CUPYBN_CUDA_AWARE_MPI=1"
    found = json.loads(cli("info", "--json", env={"CUPYBN_CUDA_AWARE_MPI": "?"}).stdout)
    assert found["transport"].startswith("ValueError: CUPYBN_CUDA_AWARE_MPI must be")
    assert "mpi_library" not in json.loads(cli("info", "--json", "--no-mpi").stdout)


def test_info_with_nothing_there():
    """Neither CuPy nor mpi4py nor an MPI library."""
    code = (
        "import sys; sys.modules |= {'cupy': None, 'mpi4py': None}; from cupybn.cli import main;"
        "sys.exit(main([*sys.argv[1:]]))"
    )
    arguments = [sys.executable, "-c", code]
    options = {"env": rank_environment(), "capture_output": True, "text": True}
    process = subprocess.run([*arguments, "info", "--json"], **options, check=True)
    found = json.loads(process.stdout)
    assert found["cupy"] == "not installed"
    assert found["mpi_library"].startswith("none: no MPI library could be loaded")
    assert found["local_device"].startswith("none: CUDA devices need CuPy")
    process = subprocess.run([*arguments, "selftest"], **options)
    assert process.returncode == 1
    assert "selftest: no MPI library could be loaded" in process.stderr


def test_info_with_a_device():
    """The facts that a stand-in for CuPy reports."""
    code = """
import sys, fake_cupy
fake_cupy.install()
from cupybn.cli import main
sys.exit(main(["info"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], env=rank_environment(CUPY_CACHE_DIR="/somewhere"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split(maxsplit=2) for line in process.stdout.splitlines()]
    assert ["CUDA", "driver", "13.0"] in lines
    assert ["CUDA", "runtime", "12.9"] in lines
    assert ["kernel", "cache", "/somewhere"] in lines
    assert "GPUs            cuda:0: Stand-in, compute capability 9.0, 141 GiB" in process.stdout
    assert "device of rank  cuda:0" in process.stdout


@pytest.mark.mpi
def test_info_over_ranks(mpirun):
    process = mpirun(3, "-m", "cupybn", "info", "--json", aborting=False)
    found = json.loads(process.stdout)  # one rank prints
    assert found["ranks"] == 3
    assert list(found["local_rank"].values()) == ["0"]


def rows(process):
    """The table, a dict for each row; the headings are told apart by two spaces."""
    lines = process.stdout.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("device  transport"))
    end = lines.index("", begin)
    table = [[cell.strip() for cell in re.split("  +", line)] for line in lines[begin:end]]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


@pytest.mark.mpi
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_selftest(mpirun, n):
    process = mpirun(n, "-m", "cupybn", "selftest", "--repeat", "5", aborting=False)
    (row,) = rows(process)
    assert f"{n} rank" in process.stdout
    assert (row["device"], row["transport"]) == ("cpu", "host")
    for name in ("float32", "uneven float32"):
        assert 0 < float(row[name]) < 1e-6
    for name in ("float16", "uneven float16"):
        assert 1e-5 < float(row[name]) < 1e-3
    assert row["same bits"] == ("yes" if n > 1 else "-")
    assert row["mismatch"] == row["bad input"] == ("seen" if n > 1 else "-")
    assert float(row["C = 64"].removesuffix(" us")) > 0
    assert "all is well" in process.stdout


@pytest.mark.mpi
@pytest.mark.parametrize(
    "fault, columns, who",
    [
        ("wrong sum", ["float32", "uneven float16"], "(ranks 0, 1, 2)"),
        ("other bits", ["same bits"], "(ranks 0, 1, 2)"),
        ("blind", ["mismatch"], "(ranks 0, 1, 2)"),
        ("deaf", ["bad input", "mismatch"], "(ranks 0, 1"),
        ("wrong dx", ["float32", "float16"], "(rank 2)"),
        ("no device", [], "rank 0"),
    ],
)
def test_selftest_finds_what_is_wrong(mpirun, fault, columns, who):
    """Every fault ends with 1, in the columns where it shows, naming the ranks."""
    program = Path(__file__).parent / "mpi" / "selftest.py"
    process = mpirun(3, program, fault, check=False, aborting=False)
    assert process.returncode != 0
    assert "all is well" not in process.stdout
    failed = [line for line in process.stdout.splitlines() if line.startswith("FAILED: ")]
    assert failed, process.stdout + process.stderr
    for column in columns:
        assert rows(process)[0][column] == "FAILED", column
        assert any(f"cpu, host, {column}: " in line and who in line for line in failed), failed
    assert who in process.stdout
    if fault != "wrong sum":
        whole = {"float32", "mismatch", "bad input", "same bits"} - set(columns)
        assert all(row[name] != "FAILED" for row in rows(process) for name in whole), failed


@pytest.mark.mpi
@pytest.mark.timeout(600)  # the first launch compiles the machine for PTX
@pytest.mark.parametrize("aware", ["0", "1"])
def test_selftest_on_a_device(mpirun, aware):
    """Each transport that is available, on the stand-in for CuPy."""
    need(missing())
    program = Path(__file__).parent / "mpi" / "selftest.py"
    env = {"CUPYBN_CUDA_AWARE_MPI": aware}
    process = mpirun(2, program, "device", "--device", "all", env=env, timeout=180)
    found = [(row["device"], row["transport"]) for row in rows(process)]
    device = [("cuda:0", "device")] if aware == "1" else []
    assert found == [("cpu", "host"), *device, ("cuda:0", "pinned"), ("cuda:0", "host")]
    assert "all is well" in process.stdout
    assert f"transport={'device' if aware == '1' else 'pinned'!r}" in process.stdout
