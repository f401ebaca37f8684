"""``python -m benchmarks``: every section runs, and its figures mean what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec

import fake_cupy
import numpy as np
import pytest
from conftest import ROOT, rank_environment
from kernel_cases import host_kernels

import cupybn
from benchmarks import cases, costs, cpu, timing
from benchmarks.__main__ import argument_parser
from benchmarks.report import Report, bars_of, no_gpu, written

NEEDS_NO_GPU = pytest.mark.skipif(not no_gpu(), reason="this machine has a CUDA device")
OPTIONS = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 280}


def run(*arguments, code=0, **env):
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    process = subprocess.run(command, env=rank_environment(**env), **OPTIONS)
    assert process.returncode == code, process.stdout + process.stderr
    return process


def report_of(*given):
    args = argument_parser().parse_args([*map(str, given)])
    return args, Report(args)


@NEEDS_NO_GPU
def test_without_a_section_it_does_what_this_machine_can(tmp_path):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    process = run("--quick", "--repeat", 3, "--json", path, "--plot", plot)
    said = process.stderr.splitlines()
    assert [line for line in said if not line.startswith("cupybn: compiling for ")] == []
    found = json.loads(path.read_text())
    assert list(found) == ["environment", "cpu", "overhead", "memory"]
    assert len(found["cpu"]["cases"]) == len(cpu.default_cases(quick=True))
    for record in found["cpu"]["cases"]:
        us = record["us"]["numpy"]
        assert us["fastest"] <= us["both"] <= us["slowest"]
        assert 0 < record["error"]["numpy"] < (1e-3 if record["dtype"] == "float16" else 1e-6)
        assert f"{written(us['both'])}  " in process.stdout
    step = found["overhead"]["cpu"]["forward + backward"]
    assert step["functions"] == sum(step["functions by file"].values()) > 1
    for record in found["memory"]["cpu"]:
        assert 0 < record["forward"] < 0.5 * record["x"], record
        assert 0 < record["backward"] < 0.5 * record["x"], record
    assert plot.exists() == (find_spec("torch") is not None)


def test_bars_are_beside_the_best_of_the_others():
    us = {"numba": 30, "torch": 60, "compiled": 20, "jax": 40, "numpy before": 1}
    record = {"shape": [8, 16], "dtype": "float32", "layout": "rows"}
    record["us"] = {name: {"both": time} for name, time in us.items()}
    alone = record | {"us": {"numba": {"both": 30}}}
    assert bars_of({"cpu": {"cases": [record, alone]}}) == [("8x16 float32", "numba", 1.5)]


def test_the_picture_of_the_docs_is_drawn_from_their_figures(tmp_path):
    picture = tmp_path / "cpu.png"
    run("--of", ROOT / "docs" / "performance-cpu.json", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a file of --json" in run("--of", "nothing.json", "--plot", picture, code=2).stderr


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")
def test_masked_calls_beside_those_without(tmp_path):
    path = tmp_path / "out.json"
    run("cpu", "--shapes", "8x16", "--paths", "numba", "masked", "--repeat", 3, "--json", path)
    (record,) = json.loads(path.read_text())["cpu"]["cases"]
    assert set(record["us"]) == {"numba", "masked"}
    assert 0 < record["ratio"]["masked / numba"] < 10
    assert record["error"]["masked"] < 1e-6


def test_beside_other_frameworks(tmp_path):
    peers = {"torch": "torch", "compiled": "torch", "interop": "torch", "jax": "jax"}
    paths = [name for name, module in peers.items() if find_spec(module)]
    path = tmp_path / "out.json"
    options = ["--shapes", "6x4x5x3", "--layouts", "rows", "columns", "--repeat", 3]
    printed = run("cpu", *options, "--paths", "numpy", *paths, "--json", path).stdout
    assert ("geometric mean" in printed) == ("torch" in paths)
    for record in json.loads(path.read_text())["cpu"]["cases"]:
        assert record["failed"] == {}
        assert set(record["us"]) == {"numpy", *paths}
        assert max(record["error"].values()) < 1e-6
        for pair in ("numpy / torch", "interop / torch", "interop / compiled"):
            assert (pair in record["ratio"]) == ("torch" in paths)


def test_beside_another_checkout(tmp_path):
    path = tmp_path / "out.json"
    options = ["--shapes", "8x16", "--paths", "numpy", "--repeat", 3, "--json", path]
    run("cpu", "--against", ROOT, *options)
    assert os.listdir(tmp_path) == ["out.json"]
    [record] = json.loads(path.read_text())["cpu"]["cases"]
    assert set(record["us"]) == {"numpy", "numpy before"}
    assert 0.1 < record["ratio"]["numpy / numpy before"] < 10
    assert record["error"]["numpy"] == record["error"]["numpy before"] < 1e-6


def test_the_backend_is_the_one_that_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(cpu, "use_cpu_backend", seen.append)
    cpu.measure_cpu(*report_of("--shapes", "8x16", "--paths", "numpy", "--repeat", 3))
    *during, after = seen
    assert set(during) == {"numpy"}
    assert after == os.environ["CUPYBN_CPU_BACKEND"]


def test_a_worker_answers_and_says_what_went_wrong(tmp_path):
    worker = timing.Worker(ROOT)
    given = ("numpy",), cases.Case((8, 16))
    for _ in range(12):  # meanwhile it makes its arrays anew
        assert set(worker.ask(cpu.served, "numpy", *given, 2)) == {"forward", "backward"}
    assert worker.ask(cpu.served, "numpy", *given, 0) < 1e-6
    with pytest.raises(KeyError, match="cupy"):
        worker.ask(cpu.served, "cupy", *given, 1)
    worker.pool.shutdown()
    with pytest.raises(RuntimeError, match=r"nothing was meant, but cupybn was found in"):
        timing.Worker(tmp_path / "nothing")


@pytest.mark.mpi
def test_comm_under_mpiexec_speaks_once(mpirun, tmp_path):
    path = tmp_path / "comm.json"
    printed = mpirun(2, "-m", "benchmarks", "--quick", "--json", path).stdout
    assert printed.count("== messages between ranks") == 1
    assert len(re.findall(r"^C = \d+ ", printed, re.M)) == 4
    for message in json.loads(path.read_text())["comm"]["messages"]:
        assert message["bytes"] >= 16 * message["channels"]
        assert message["us"]["step"] > message["us"]["bare"] > 0
        assert message["functions"] > 1


@NEEDS_NO_GPU
@pytest.mark.parametrize(
    ("given", "env", "says"),
    [
        (["gpu"], {}, "error: gpu: device"),
        (["cpu"], {"PMI_SIZE": "2"}, "under mpiexec only comm"),
        (["gpus"], {}, "no section gpus: there are cpu, gpu, kernels, comm, overhead, memory"),
        (["--repeat", "0"], {}, "must be at least 1"),
        (["--shapes", "32"], {}, "must look like 32x64x56x56, got '32'"),
        (["cpu", "--json", "nowhere/x.json"], {}, "nowhere/x.json cannot be written"),
        (["cpu", "--against", "docs"], {}, "--against: docs is no checkout of cupybn"),
        (["comm"], {"MPI4PY_LIBMPI": "/none.so"}, "error: cannot load MPI library"),
    ],
)
def test_what_cannot_be_measured(given, env, says):
    assert says in run(*given, code=2, **env).stderr


@pytest.fixture
def gpu(monkeypatch):
    """The section, with the stand-in for CuPy and kernels that do nothing."""
    with host_kernels():
        fake_cupy.do_nothing()
        module = importlib.import_module("benchmarks.gpu")
        monkeypatch.setattr(module, "_COPIED", 1)
        yield module
        del sys.modules["benchmarks.gpu"]


def test_gpu_with_numpy_in_its_place(gpu, capsys, monkeypatch):
    """The bench goes on after a case that does not fit in memory."""

    def tensors(xp, torch, case, seed):
        if case.shape == (8, 16):
            raise MemoryError
        return cases.Tensors(xp, torch, case, seed)

    monkeypatch.setattr(gpu, "Tensors", tensors)
    monkeypatch.setattr(gpu, "_ODD", "8x16 2x4x3x3x3")
    monkeypatch.setattr(cases, "RESNET50", "11*4x7x7 42*8x3x3")
    args, report = report_of("gpu", "--quick")
    gpu.measure_gpu(args, report)
    assert report.environment["device"] == "Stand-in"
    [without, *records] = sorted(report.sections["gpu"]["cases"], key=lambda r: len(r["shape"]))
    assert (without["us"], without["failed"]) == ({}, {"all": "MemoryError: "})
    assert len(records) == 2 * 3
    for record in records:
        assert record["us"]["cupybn"]["forward"] > 0
        assert record["issued us"]["cupybn"] > 0
    assert "2x4x3x3x3 float16 columns" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_beside_pytorch_with_numpy_in_its_place(gpu, dtype, monkeypatch):
    monkeypatch.setattr(gpu, "torch", pytest.importorskip("torch"))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(fake_cupy.ndarray, "__dlpack_device__", lambda self: (1, 0))
    for case in cases.products(["8x6x5x5"], [dtype], ["columns"]):
        found = gpu.record(case, [*gpu.PATHS], 3)
        assert found["us"]["native"]["both"] > 0
        assert found["ratio"]["cupybn / native"] > 0
        assert set(found["failed"]) == {"cudnn"}  # of a CPU tensor


def test_resnet50(gpu):
    assert len(cases.of_resnet50([1])) == 12
    found = cases.products(["32x1024x14x14", "32x64x56x56", "32x9x9x9"], ["float16"])
    ratios = [{"a": 0.25, "b": 0.2}, {"a": 0.5, "b": 2.0}, {"a": 9.0, "b": 9.0}]
    us = {"us": {"cupybn": {"both": 10.0}}}
    records = [case._asdict() | us | {"ratio": r} for case, r in zip(found, ratios, strict=True)]
    mean = pytest.approx((4**7 * 0.5**6) ** (1 / 13))
    found = {"mean speedup": mean, "lowest": 0.5, "sum": None}
    assert gpu.resnet50(records) == {"N=32 float16 rows": found}
    times = [1.0] * 11 + [100.0]  # the last one is of 4 layers, and half as fast as PyTorch's
    records = [
        case._asdict() | {"us": {"cupybn": {"both": t}}, "ratio": {"a": 0.5 if t == 1 else 2.0}}
        for case, t in zip(cases.products(cases.of_resnet50([8]), ["float16"]), times, strict=True)
    ]
    [all_of_it] = gpu.resnet50(records).values()
    assert all_of_it["sum"] == pytest.approx((49 * 2 + 400 / 2) / (49 + 400))


def test_memory_is_what_is_allocated(gpu):
    kept = {}

    def call():
        kept["y"] = np.ones(1 << 20)
        np.ones(1 << 19)

    assert costs.on_host(call) == pytest.approx((12 << 20, 8 << 20), rel=1e-3)

    def call_of_device():
        kept["x"] = fake_cupy.empty(3)
        fake_cupy.empty(4)

    assert costs.on_device(call_of_device) == (56, 24)


def test_functions_are_counted():
    layer, x = cupybn.BatchNorm1d(4), np.ones((3, 4))
    assert costs.entered(layer.zero_grad).total() >= 1
    assert dict(costs.entered(lambda: x.sum())) == {"_core/_methods.py": 1}
    assert costs.entered(lambda: [time.time(), sorted([2, 1])]).total() == 0


def test_turns_are_taken_and_times_are_of_one_call():
    order = []

    def spend(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    turns = {
        "a": timing.turn_of({"forward": spend("af", 0.004), "backward": spend("ab", 0.012)}),
        "b": timing.turn_of({"call": spend("b", 0.0001)}),
    }
    times = timing.interleave(turns, 4)
    # Twice each, to find out how many calls make a block; then in alternating order.
    assert re.fullmatch(r"(af ab ){2}(b ){2}(af ab (b )+af ab ){2}", " ".join(order) + " ")
    found = timing.figures(times, [("a", "b"), ("a", "c")])
    a, b = found["us"]["a"], found["us"]["b"]
    assert 4000 <= a["forward"] < a["backward"] >= 12000
    assert 16000 <= a["fastest"] <= a["both"] <= a["slowest"]
    assert 100 <= b["call"] == b["both"] < a["forward"]
    assert found["ratio"]["a / b"] > 1
    assert len(timing.interleave(turns, 50, seconds=0)["a"]["forward"]) == 3


def test_each_turn_begins_with_calls_that_are_not_timed():
    order = []
    call = {"call": lambda: (order.append("call"), time.sleep(0.002))}
    ready, finish = (lambda: order.append("ready")), (lambda: time.sleep(0.01))
    assert 0.012 <= timing.turn_of(call, ready, finish, warm=0.5)(1)["call"] < 0.5
    assert re.fullmatch("(call ){5,}ready call", " ".join(order))


def test_the_last_line_has_geometric_means():
    ratios = {"numpy / torch": 4.0}, {"numpy / torch": 1.0, "jax / torch": 3.0}
    assert cpu.means([{"ratio": ratio} for ratio in ratios]) == {"numpy / torch": 2.0}
