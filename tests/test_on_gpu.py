"""The three steps for a GPU run to their ends without one; what they measure is there, and told."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, _mpiexec, rank_environment
from kernel_cases import host_kernels
from ptx import nvrtc
from test_bench import report_of

from benchmarks import cases, results
from cupybn.backends.cuda import launch, plan, source

LEFT_OUT = {
    "first": {"device", "pytorch", "kernels float64", "kernels bfloat16", "odd shapes float16"},
    "why": set(),
    "ranks": {"memcheck", "racecheck", "more than 2^31 elements"},
}
FIGURES = {
    "first": {"overhead", "six-shapes", "ResNet-50"},
    "why": {"resident-beside-streaming", "kernels-float16", "kernels-float32", "bench-float32"},
    "ranks": {"messages-2-ranks", "messages-4-ranks"},
}


def step(name, folder, timeout=290, **env):
    env = rank_environment(PYTHON=sys.executable, MPIEXEC=str(_mpiexec())) | env
    command = [ROOT / "tests" / "on_gpu.sh", name, folder]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.rehearsal
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", results.STEPS)
def test_a_step_runs_to_its_end(name, tmp_path):
    process = step(name, tmp_path, REHEARSE="1")
    assert process.returncode == 0, process.stdout + process.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    ends = {part["part"]: part["end"] for part in found["parts"]}
    left_out = {part.partition(":")[0] for part, end in ends.items() if end == "left out"}
    assert left_out == LEFT_OUT[name]
    assert {*ends.values()} - {"left out"} == {"exit 0"}
    assert set(found["figures"]) == FIGURES[name]
    for part, end in ends.items():  # the table comes last, and every part left its output
        assert part in process.stdout.rpartition(f"#### {name}, ")[2]
        if end == "exit 0":
            assert (tmp_path / f"{name}-{part.replace(' ', '-')}.log").stat().st_size > 0
    for figures in found["figures"].values():
        for section, values in figures.items():
            if section in results._TABLES:
                for rows in results._TABLES[section](values):
                    assert rows or section == "gpu", (section, values)  # no ResNet-50 in few shapes
    with pytest.raises(ValueError, match="of a rehearsal"):
        results.write(tmp_path, tmp_path)


@pytest.mark.rehearsal
def test_a_step_goes_on_where_parts_fail_or_take_too_long(tmp_path):
    """MPI is not there, and the time of one part is short; the table comes, and tells."""
    python = tmp_path / "python"
    slow = 'case "$*" in *train_digits*) exec sleep 100 ;; esac'
    python.write_text(f'#!/bin/sh\n{slow}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    env = {"PYTHON": str(python), "MPIEXEC": "/no/mpiexec", "REHEARSE": "1", "LIMIT": "28"}
    process = step("ranks", tmp_path, timeout=60, **env)
    assert process.returncode == 1
    table = process.stdout.rpartition("#### ranks, ")[2]
    assert re.search(r"^exit 127 +\d+ s  selftest 2 ranks$", table, re.M), table
    assert re.search(r"^exit 124 +\d+ s  digits 1 rank$", table, re.M), table
    assert int(re.match(r"\d+", table)[0]) <= 30
    assert len(json.loads((tmp_path / "ranks.json").read_text())["parts"]) == 10


@pytest.fixture
def kernels():
    """The section, with the stand-in for CuPy and kernels that do nothing."""
    with host_kernels() as cupy:
        cupy.do_nothing()
        yield importlib.import_module("benchmarks.kernels")
        for name in ("kernels", "gpu"):  # they hold this stand-in
            del sys.modules[f"benchmarks.{name}"]


def test_every_variant_is_another_one(kernels):
    """A text with other constants, or other launches; and nothing of it stays."""
    before = vars(plan).copy(), launch._resident, source.compile_module
    [original, *changed] = [launches(kernels, variant) for variant in kernels.VARIANTS]
    for variant, found in zip(kernels.VARIANTS[1:], changed, strict=True):
        texts, grids = zip(original, found, strict=True)
        other = bool(variant.text or variant.resident == "1")
        assert (texts[0] != texts[1]) == other, variant.name
        assert (grids[0] != grids[1]) == (not variant.text), variant.name
        alone = {name for name, *_ in grids[1]} & kernels.RESIDENT.keys()
        assert bool(alone) == (variant.name == "resident")
    assert (vars(plan), launch._resident, source.compile_module) == before


def launches(kernels, variant):
    """The texts that are compiled, and the grids of all launches over some tensors."""
    texts, grids, compile_module = [], [], source.compile_module

    def noted(text, names):
        texts.append(text)
        return compile_module(text, names)

    for case in cases.products(["128x4x112x112", "64x6x28x28", "4096x128"], ["float16"]):
        source.compile_module = noted
        try:
            notes = []
            with kernels.taking(variant, notes):
                forward, backward = kernels.of_layer(case)
                t = cases.Tensors(kernels.cupy, None, case)
                backward(t, forward(t))
        finally:
            source.compile_module = compile_module
        if variant.resident == "0":
            assert [name for name, _ in notes] == list(kernels.KERNELS)
        grids += [(name, *again.args[:2]) for name, again in notes]
    return texts, grids


@pytest.mark.rehearsal
def test_every_variant_compiles(kernels):
    if why := nvrtc.missing():
        assert not os.environ.get("CUPYBN_REQUIRE_CUDA_TOOLS"), why
        pytest.skip(why)
    for variant in kernels.VARIANTS:
        if variant.text:
            for text in launches(kernels, variant)[0]:
                assert ".entry" in nvrtc.compile_text(text, "sm_90")  # ptxas, too


def test_a_constant_that_is_gone_is_told(kernels, monkeypatch, capsys):
    gone = kernels.Variant("gone", kernels._constant("NO_SUCH", "+ 1"))
    monkeypatch.setattr(kernels, "VARIANTS", (*kernels.VARIANTS[:1], gone))
    args, report = report_of("kernels", "--shapes", "16x8x64x64", "--repeat", "3")
    kernels.measure_kernels(args, report)
    [record] = report.sections["kernels"]["cases"]
    assert set(record["kernels"]) == set(kernels.KERNELS)
    assert record["failed"]["gone"].startswith("LookupError: ")
    assert "gone: LookupError" in capsys.readouterr().out


def test_ratios_and_means(kernels):
    times = {
        "as it is": {"a": [2.0, 4.0, 2.0], "b": [6.0, 4.0, 6.0]},
        "UNROLL * 2": {"a": [1.0, 2.0, 1.0], "b": [6.0, 4.0, 6.0]},
    }
    found = kernels.ratios(times)
    assert found == {"UNROLL * 2": {"a": 0.5, "b": 1.0, "sum": 7 / 8}}
    times = {
        "as it is": {"batch_moments": [2.0], "normalize": [4.0], "backward_reduce": [3.0]},
        "resident": {"local_forward": [3.0], "backward_reduce": [3.0]},
    }
    expected = {"backward_reduce": 1.0, "forward": 0.5, "backward": 1.0, "sum": 6 / 9}
    assert kernels.ratios(times) == {"resident": expected}
    other = {"UNROLL * 2": {"a": 2.0, "b": 1.0, "sum": 1.5}}
    [mean] = kernels.over_cases([{"variants": found}, {"variants": other}]).values()
    assert mean["a"] == pytest.approx(1)
    assert mean["slowest"] == 1.5


def test_the_model_stands_beside_what_was_measured(kernels):
    case = cases.Case((32, 64, 112, 112), "float16")
    row = kernels.beside("normalize", 25.0, case, 4.3e12)
    assert row["%"] == pytest.approx(100 * 2 * case.bytes / 25e-6 / 4.3e12)
    assert row["/"] == pytest.approx(25.0 / row["predicted"])
    assert 20 < row["predicted"] < 30  # 51 MB twice at 4.3 TB/s are 24 us
    alone = kernels.beside("local_forward", 25.0, case._replace(shape=(32, 256, 56, 56)), 4.3e12)
    assert 24 < alone["predicted"] < 30  # the same once: as much as one pass, without the other
    assert kernels.beside("other", 1.0, case, 4.3e12)["predicted"] is None


def test_the_page_keeps_what_was_written_by_hand(tmp_path):
    us = {"forward": 10.0, "backward": 20.0, "both": 30.0}
    record = cases.Case((8, 4, 2, 2), "float16")._asdict() | {"bytes": 256, "ratio": {"a / b": 0.5}}
    gpu = {"copy rate before": 1e12, "copy rate after": 1e12, "ResNet-50": {}}
    gpu["cases"] = [record | {"us": {"cupybn": us}}]
    figures = {"environment": {"device": "Some GPU", "jax": None}, "gpu": gpu}
    found = {"date": "2030-01-01 00:00", "figures": {"bench": figures}}
    found["nvidia-smi"] = ["| NVIDIA-SMI 580  Driver Version: 580 |"]
    found["parts"] = [{"part": "bench", "end": "exit 0", "seconds": 3}]
    (tmp_path / "first.json").write_text(json.dumps(found))
    results.write(tmp_path, tmp_path)
    page = tmp_path / "gpu-results.md"
    assert "Driver Version: 580" in page.read_text()
    assert "| 8x4x2x2 float16 rows | 10.00 | 20.00 | 7.7e-03 | 6.4e-03 | 0.50 |" in page.read_text()
    page.write_text(page.read_text() + "\nIt came as predicted.\n")
    found["date"] = "2031-01-01 00:00"
    (tmp_path / "first.json").write_text(json.dumps(found))
    results.write(tmp_path, tmp_path)
    assert page.read_text().endswith(f"{results.MARK}\n\nIt came as predicted.\n")
    assert "2031" in page.read_text()
    assert "2030" not in page.read_text()
    kept = json.loads((tmp_path / "gpu-results.json").read_text())["first"]
    assert kept == json.loads(json.dumps(found))  # shapes are lists there
