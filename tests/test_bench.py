"""``python -m cupybn bench``: every section runs, and its figures mean what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser
from types import SimpleNamespace

import numpy as np
import numpy_as_cupy
import pytest
from conftest import rank_environment

import cupybn
from cupybn import backends
from cupybn.cli import bench, main
from cupybn.cli.bench import (
    cases,
    comm,
    cpu,
    gpu,
    memory,
    model,
    overhead,
    report,
    scaling,
    threads,
    timing,
    totals,
)

NEEDS_NO_GPU = pytest.mark.skipif(not bench._no_gpu(), reason="this machine has a CUDA device")


def run(*arguments, code=0, **env):
    process = subprocess.run(
        [sys.executable, "-m", "cupybn", "bench", *map(str, arguments)],
        env=rank_environment(**env), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert process.returncode == code, process.stdout + process.stderr
    return process


def arguments(*given):
    parser = ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([*given])


@NEEDS_NO_GPU
def test_without_a_section_it_does_what_this_machine_can(tmp_path):
    path = tmp_path / "out.json"
    process = run("--quick", "--repeat", 3, "--json", path, "--plot", tmp_path / "out.png")
    lines = process.stdout.splitlines()
    assert lines[0] == (
        f"$ python -m cupybn bench --quick --repeat 3 --json {path} --plot {tmp_path / 'out.png'}"
    )
    assert f"cupybn     {cupybn.__version__}" in lines
    assert process.stderr == ""
    assert "left out: --comm, because it is measured between ranks" in process.stdout
    assert "left out: --gpu, because device" in process.stdout
    found = json.loads(path.read_text())
    assert list(found) == ["environment", "left out", "cpu", "overhead", "memory"]
    assert set(found["left out"]) == {"comm", "gpu"}
    for name in ("cpu", "overhead", "memory"):
        assert (tmp_path / f"out-{name}.png").read_bytes().startswith(b"\x89PNG")
    check_cpu(found["cpu"], process.stdout)
    assert found["overhead"]["cpu"]["us"]["cupybn forward + backward"] > 1
    assert sum(f["share"] for f in found["overhead"]["cpu"]["profile"]["files"]) == pytest.approx(1)
    for record in found["memory"]["cpu"]:
        assert 0 < record["forward extra"] < 0.5 * record["bytes"], record
        assert 0 < record["backward extra"] < 0.5 * record["bytes"], record


def check_cpu(section, printed):
    assert [tuple(record["shape"]) for record in section["cases"]] == [
        case.shape for case in cpu.quick_cases()
    ]
    for record in section["cases"]:
        path = record["paths"]["numpy"]
        assert path["forward us"] > 1
        assert path["fastest us"] <= path["both us"] <= path["slowest us"]
        limit = 1e-3 if record["dtype"] == "float16" else 1e-6
        assert 0 < path["y error"] < limit
        assert 0 < path["dx error"] < limit
        shape = "x".join(map(str, record["shape"]))
        assert re.search(rf"^ +{shape} .*{path['both us'] / 1e3:.3f}", printed, re.MULTILINE)
    assert section["copy rate"]["1"] > 1e8


@pytest.mark.mpi
def test_comm_starts_mpiexec_itself(tmp_path):
    path = tmp_path / "comm.json"
    options = ["--comm", "--ranks", "1,2", "--quick", "--json", path, "--plot", tmp_path / "c.png"]
    printed = run(*options).stdout
    found = json.loads(path.read_text())["comm"]
    assert [r["ranks"] for r in found["runs"]] == [1, 2]
    for one in found["runs"]:
        assert [(m["channels"], m["direction"]) for m in one["messages"]] == [
            (c, way) for c in (64, 256, 2048) for way in ("forward", "backward")
        ]
        assert all(value > 0 for m in one["messages"] for value in m["us"].values())
        assert f"\n{one['ranks']} rank(s) on 1 host(s)" in printed
        assert one["watchdog"]["us"]["with timeout"] > 0
    assert [m["bytes"] for m in found["runs"][1]["messages"][::2]] == [
        model.message_bytes(c) for c in (64, 256, 2048)
    ]
    assert max(row["ranks"] for row in found["model"]["networks"][-1]["rows"]) == 4096
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    np.finfo(np.longdouble).eps > 1e-18, reason="here long double has no more digits than float64"
)
def test_float64_results_are_held_against_more_digits():
    """In columns a float64 mean of many rows has an error of its own, above that of the results."""
    x = 1e3 + np.random.default_rng(0).standard_normal((1 << 16, 4))
    case = SimpleNamespace(x=x, dy=x[::-1] - 1e3)
    y, dx = (a.astype(np.float64) for a in cpu._exact(*(
        a.astype(np.longdouble) for a in (case.x, case.dy)
    )))  # fmt: skip
    errors = cpu._errors(case, {"y": y, "dx": dx})
    assert max(errors.values()) < 2e-16


@pytest.mark.mpi
def test_comm_under_mpiexec_speaks_once(mpirun, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; from cupybn.cli import main; sys.exit(main(sys.argv[1:]))\n")
    printed = mpirun(2, script, "bench", "--quick").stdout  # without a section: what ranks can do
    assert printed.count("== messages between ranks") == 1
    assert "left out: --cpu, because they are measured in one process" in printed
    assert len(re.findall(r"^(?: +64| 256|2048)  (?:forward|backward) ", printed, re.M)) == 6


@pytest.mark.parametrize(
    ("given", "env", "says"),
    [
        (["--cpu"], {"PMI_SIZE": "2"}, "under mpiexec only --comm"),
        (["--comm", "--ranks", "2"], {"PMI_SIZE": "2"}, "--ranks starts mpiexec itself"),
        (["--ranks", "0"], {}, "must be a number from 1, got '0'"),
        (["--shapes", "32"], {}, "must look like 32x64x56x56, got '32'"),
        (["--cpu", "--backend", "cupy"], {}, "--backend must be of numpy, numba, got cupy"),
        (["--cpu", "--json", "nowhere/x.json"], {}, "nowhere/x.json cannot be written"),
    ],
)
def test_what_cannot_be_measured(given, env, says):
    assert says in run(*given, code=2, **env).stderr


@NEEDS_NO_GPU
def test_no_gpu(capsys):
    assert main(["bench", "--gpu"]) == 2
    assert "bench: --gpu: device" in capsys.readouterr().err


@pytest.fixture
def fake(monkeypatch):
    """A GPU that NumPy plays; layers stay on the CPU."""
    module = numpy_as_cupy.make()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "_COPIED", 1 << 16)
    return module


def test_gpu_with_numpy_in_its_place(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "ODD", [(8, 16), (2, 4, 3, 3, 3)])
    monkeypatch.setattr(cases, "RESNET50", {(4, 7, 7): 11, (8, 3, 3): 42})
    path = tmp_path / "gpu.json"
    options = ["--gpu", "--quick", "--json", str(path), "--plot", str(tmp_path / "gpu.png")]
    assert main(["bench", *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["environment"]["device"] == "a device that is none"
    assert len(found["gpu"]["cases"]) == 2 * 2 + 2 + 1
    for record in found["gpu"]["cases"]:
        ours = record["paths"]["cupybn"]
        assert ours["forward us"] > 0
        assert ours["issued us"] > 0
    sums = {total["layout"]: total["layers"] for total in found["gpu"]["totals"]}
    assert sums == {"rows": 53, "columns": 53}
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "resnet, float16, columns" in printed
    assert "copy rate: " in printed


def test_gpu_goes_on_after_a_case_without_memory(fake, tmp_path, capsys, monkeypatch):
    class Full(gpu.Tensors):
        def __init__(self, xp, torch, case, seed=0):
            if case.shape == (8, 16):
                raise MemoryError
            super().__init__(xp, torch, case, seed)

    monkeypatch.setattr(gpu, "Tensors", Full)
    path = tmp_path / "gpu.json"
    shapes = ["--shapes", "8x16", "4x8x3x3", "--layouts", "rows", "--dtypes", "float32"]
    assert main(["bench", "--gpu", "--no-torch", "--quick", *shapes, "--json", str(path)]) == 0
    without, other = json.loads(path.read_text())["gpu"]["cases"]
    assert (without["paths"], without["skipped"]) == ({}, "MemoryError: ")
    assert other["paths"]["cupybn"]["forward us"] > 0
    assert "MemoryError" in capsys.readouterr().out


def test_gpu_beside_pytorch_with_numpy_in_its_place(fake, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    machine = gpu.Bench(torch, 3)
    for dtype in cases.available(["float32", "bfloat16"]):
        case = cases.Case("odd", (8, 6, 5, 5), 1, dtype, "columns")
        record = machine.record(case, list(gpu.PATHS))
        assert record["paths"]["native"]["both us"] > 0
        assert "failed" in record["paths"]["cudnn"]  # of a CPU tensor
        y, dx = record["largest difference"]["native"]
        assert max(y, dx) < (1e-5 if dtype == "float32" else 0.05)


def test_gpu_memory_is_what_the_pool_hands_out(fake):
    def call():
        fake.empty(3)
        fake.empty(4)
        fake.get_default_memory_pool().bytes -= 100

    assert memory.DeviceMeter().of(call) == (200, 100, None)


def test_host_memory_is_what_numpy_allocates():
    kept = {}

    def call():
        kept["y"] = np.ones(1 << 20)
        np.ones(1 << 19)

    peak, after, resident = memory.HostMeter().of(call)
    assert peak == pytest.approx(12 << 20, rel=1e-3)
    assert after == pytest.approx(8 << 20, rel=1e-3)
    if resident is not None:
        assert resident == pytest.approx(12 << 20, rel=0.2)


def test_the_backend_is_the_one_that_is_named(monkeypatch):
    seen, forward = [], backends.numpy_backend.local_forward
    module = type(sys)("cupybn.backends.spy")
    vars(module).update(vars(backends.numpy_backend))
    module.local_forward = lambda *a, **k: seen.append(1) or forward(*a, **k)
    before = backends.cpu_backend()
    monkeypatch.setitem(sys.modules, "cupybn.backends.spy", module)
    args = arguments("--quick", "--repeat", "3", "--no-torch", "--backend", "numpy", "spy")
    out = report.Report(args, speaks=False)
    cpu.measure(args, out)
    assert seen
    assert backends.cpu_backend() is before
    assert set(out.sections["cpu"]["cases"][0]["paths"]) == {"numpy", "spy"}


def test_resnet50_has_53_batch_norms_of_12_shapes():
    assert (len(cases.RESNET50), sum(cases.RESNET50.values())) == (12, 53)
    chosen = list(cases.every_case(arguments()))
    assert {case.dtype for case in chosen} == set(bench.DTYPES)
    assert len(chosen) == 4 * (2 * 3 * 12 + 6 + 4)


@pytest.mark.parametrize("dtype", cases.available(bench.DTYPES))
def test_tensors(dtype):
    t = cases.Tensors(np, None, cases.Case("odd", (3, 4, 5, 6), 1, dtype, "columns"))
    assert t.x.shape == t.dy.shape == (3, 4, 5, 6)
    assert np.moveaxis(t.x, 1, -1).flags.c_contiguous
    assert t.x.dtype.name == dtype
    x, dy = t.x.astype(np.float64), t.dy.astype(np.float64)
    assert 0.7 < x.std() < 1.3
    assert abs(np.corrcoef(x.ravel(), dy.ravel())[0, 1]) < 0.2


def test_turns_are_taken_and_times_are_of_one_call():
    order = []

    def spend(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    paths = {
        "a": {"forward": spend("af", 0.004), "backward": spend("ab", 0.012)},
        "b": {"call": spend("b", 0.0001)},
    }
    found = timing.interleave(paths, 4)
    assert order[-1] == "b"
    rounds = re.findall(r"(?:af ab )+(?:b )+", " ".join(order) + " ")
    assert len(rounds) == 1 + 4  # the first is for finding out how many calls make a block
    a, b = (timing.in_microseconds(found[name]) for name in "ab")
    assert a["repetitions"] == b["repetitions"] == 4
    assert 4000 <= a["forward us"] < 8000 < 12000 <= a["backward us"]
    assert a["both us"] >= 16000
    assert 100 <= b["call us"] < 1000
    assert len(timing.interleave(paths, 50, seconds=0)["a"]["forward"]) == 3


def test_each_turn_begins_with_calls_that_are_not_timed():
    paths = {"a": {"call": lambda: time.sleep(0.002)}}
    began = time.perf_counter()
    timing.interleave(paths, 3, calls=1)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    found = timing.interleave(paths, 3, calls=1, warm=0.05)
    assert time.perf_counter() - began > cold + 0.1
    assert [len(times) for times in found["a"].values()] == [3]
    assert max(found["a"]["call"]) < 0.05


def test_the_fit_finds_the_network():
    network = model.Network(7e-6, 1 / 3e9)
    sizes = [2048, 8192, 65536]
    points = [
        model.Point(p, b, model.allreduce_seconds(network, p, b)) for p in (2, 4, 8) for b in sizes
    ]
    found = model.fit(points)
    assert found.alpha == pytest.approx(7e-6)
    assert found.beta == pytest.approx(1 / 3e9)


def test_the_model_is_that_of_the_literature():
    us = 1e-6
    assert model.allreduce_seconds(model.CLUSTER, 8, 0) == pytest.approx(9 * us)
    assert model.all_gather_seconds(model.CLUSTER, 4096, 4 * 4097) == pytest.approx(
        2720 * us, rel=1e-3
    )
    assert model.all_gather_seconds(model.CLUSTER, 1, 1000) == 0


def test_gathered_statistics_merge_to_those_of_all():
    parts = [np.random.default_rng(i).standard_normal((n, 3)) + i for i, n in enumerate((4, 9, 2))]
    table = np.array([
        [*part.mean(0), *(1 / np.sqrt(part.var(0) + cases.EPS)), len(part)] for part in parts
    ], np.float32)  # fmt: skip
    mean, invstd = scaling.merge(table, 3)
    everything = np.concatenate(parts)
    np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(everything.var(0) + cases.EPS), rtol=1e-5)


def test_totals_are_weighted():
    def record(layers, ours, theirs):
        paths = {"cupybn": {"both us": ours}, "native": {"both us": theirs}, "cudnn": {}}
        return {"group": "resnet", "shape": (32, 4), "layers": layers, "dtype": "float16",
                "layout": "rows", "bytes": 1000, "paths": paths}  # fmt: skip

    [total] = totals.totals(
        [record(1, 10.0, 40.0), record(3, 20.0, 10.0)], {"0": 1e9}, ("cupybn", "native", "cudnn"),
        ("native", "cudnn"),
    )  # fmt: skip
    assert total["layers"] == 4
    assert total["cupybn both us"] == 70
    assert total["native both us"] == 70
    assert "cudnn both us" not in total
    assert total["floor us"] == pytest.approx(4 * 8 * 1000 / 1e9 * 1e6)
    assert total["geometric mean of speedups"] == pytest.approx((4 * 0.5**3) ** 0.25)
    assert total["lowest speedup"] == 0.5


def test_the_profile_finds_where_time_goes():
    def costly():
        return sorted(range(3000), key=lambda i: -i)

    found = overhead.profiled(costly, 5)
    [own] = [f for f in found["functions"] if f["function"].startswith("<lambda>")]
    assert "tests/test_bench.py" in own["function"]
    assert own["calls"] == 3000
    assert own["share"] > 0


def test_threads(monkeypatch):
    assert threads.choices([2, 3]) == [2, 3]
    assert threads.choices(None)[0] == 1
    monkeypatch.setattr(threads, "find_spec", lambda name: None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    assert threads.choices([2, 3]) == [5]


def test_a_table_lines_up():
    table = report.Table(("name", "<8s"), ("ms", ">7.2f"), ("a long title", ">4d"))
    assert table.header() == "name           ms  a long title"
    assert table.line("ab", 1.234, None) == "ab           1.23             -"


def test_the_limit_is_in_the_table(capsys):
    us = {"allreduce": 4.0, "cupybn": 12.0, "no watchdog": 11.0, "gather": 16.0}
    run_ = {
        "ranks": 2, "hosts": 1, "library": "MPI", "crowded": False,
        "messages": [{"channels": 64, "direction": "forward", "bytes": 2048, "us": us}],
        "watchdog": {"us": {"bare": 4.0, "without timeout": 5.0}, "cost us": 0.1, "percent": 2.0},
    }  # fmt: skip
    comm.say_run(report.Report(arguments()), run_)
    row = capsys.readouterr().out.splitlines()[3].split()
    assert row[3:] == ["4.00", "12.00", "11.00", "16.00", "20.00", "8.00", "0.75"]


def test_the_json_file_is_whole_at_any_time(tmp_path):
    args = arguments("--json", str(tmp_path / "out.json"))
    out = report.Report(args)
    out.begin("cpu", "title")["cases"] = [1]
    out.flush()
    assert json.loads((tmp_path / "out.json").read_text())["cpu"] == {"cases": [1]}
    assert os.listdir(tmp_path) == ["out.json"]
