"""The command for a GPU, rehearsed whole without one: at toy sizes, with stand-ins for NVIDIA's tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import bench, command, convergence, each_kernel, kernels, profiling, suite
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.log import Log, Measurement, read
from tests.helpers.forked import run_script

ROOT = Path(__file__).parents[2]
SMI = "NVIDIA H100 80GB HBM3, 580.65.06, 1755, 1980, 2619, 41, 121.55, [N/A]"
NCU_CSV = """==PROF== Connected to process 4711
==PROF== Profiling "scores_kernel": 0%....50%....100% - 10 passes
"ID","Process ID","Kernel Name","Block Size","dram__bytes.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"gpu__time_duration.sum","launch__registers_per_thread","smsp__inst_executed.sum",\
"smsp__issue_active.avg.pct_of_peak_sustained_active"
"","","","","byte","%","ns","register/thread","inst","%"
"0","4711","scores_kernel","(32, 1, 1)","1,024","10.5","2000","94","300","80"
"1","4711","scores_kernel","(32, 1, 1)","1,024","20.5","3000","94","300","60"
"2","4711","_softmax_kernel","(128, 1, 1)","64","90","1000","40","5","7.5"
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with an nvidia-smi and an ncu that print what the real ones do."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, shown in {"nvidia-smi": SMI, "ncu": NCU_CSV}.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{shown}\nEND\n")
        script.chmod(0o755)
    return folder


def _run(folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": f"{path}:{os.environ['PATH']}"}
    argv = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def _fork(folder: Path, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """What :func:`_run` gives, without the seconds that a process takes to import."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"}
    return run_script([str(ROOT / "benchmarks/__main__.py"), *words], folder, environment, 400)


def _lines(folder: Path) -> list[dict]:
    (file,) = (folder / "runs/benchmarks").glob("*-rehearsal.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_rehearsal_and_table(tmp_path: Path, tools: Path) -> None:
    run = _run(tmp_path, "gpu", "--rehearse", "--minutes", "6", path=str(tools))
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("A rehearsal under Triton's interpreter at toy sizes")
    assert "Everything is measured." in run.stdout
    lines = _lines(tmp_path)
    assert [line["part"] for line in lines if line["part"] == "machine"] == ["machine"]
    assert {line["part"] for line in lines} == {"machine", *command.PARTS}
    assert not [line for line in lines if "failed" in line]
    triton = [line for line in lines if line["settings"].get("side") == "ours, Triton" and "skipped" not in line]
    assert {line["name"] for line in triton} == {"masked_pool", "pair_contrast"}
    again = _fork(tmp_path, "gpu", "--rehearse", "--minutes", "6", path=str(tools))
    assert again.returncode == 0 and len(_lines(tmp_path)) == len(lines) + 1  # clocks and rates alone
    (file,) = (tmp_path / "runs/benchmarks").glob("*.jsonl")
    table = _fork(tmp_path, "table", str(file)).stdout
    assert "| kernels | pair_contrast 2 3 highest ours, Triton |" in table
    assert "issue_slots_busy_percent" in table and "1755" in table


@pytest.mark.parametrize(
    "words, message",
    [
        (["table", "missing"], "missing: there is no such file"),
        (["table", "."], ".: there is no such file"),
        (["table", "binary"], "binary: there are no measurements in it"),
        (["table", "foreign"], "foreign: there are no measurements in it"),
        (["gpu", "--minutes", "-1"], "--minutes: -1 leaves no time"),
        (["masked_pool", "--batches", "0"], "--batches: '0' is not a whole number above 0"),
    ],
)
def test_bad_input(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "foreign").write_text('{"a": 1}\n[1]\n')
    run = _fork(tmp_path, *words)
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


def test_clocks(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    shown = bench.clocks()
    assert shown["name"] == "NVIDIA H100 80GB HBM3" and shown["clocks.sm"] == 1755 and shown["power.limit"] is None
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert bench.clocks() == {"failed": "No devices were found"}
    monkeypatch.setenv("PATH", "")
    assert "skipped" in bench.clocks()


def test_profiles() -> None:
    found = profiling.read_raw(NCU_CSV)
    assert found["scores_kernel"] == {
        "launches": 2,
        "ns": 5000,
        "issue_slots_busy_percent": 70,
        "instructions": 600,
        "dram_percent": 15.5,
        "dram_bytes": 2048,
        "registers": 94,
    }
    assert found["_softmax_kernel"]["issue_slots_busy_percent"] == 7.5
    assert profiling.read_raw("==ERROR== ERR_NVGPUCTRPERM") == {}


def test_ncu_that_may_not_count(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tools / "ncu").write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert "ERR_NVGPUCTRPERM" in profiling.profile(lambda: 60, 3, "highest")["failed"]


def test_every_kernel_is_profiled() -> None:
    few, many = each_kernel.names(3), each_kernel.names(200)
    assert {"_mask_kernel", "_backward_kernel"} < set(few) & set(many)
    assert any("scores" in name for name in few) and any("own" in name for name in many)
    each_kernel.launches(torch.device("cpu"), 3, 2, 8)()


def test_outcomes_of_tests() -> None:
    report = """<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/>
        </testcase><testcase classname="a" name="d"><failure message="1 != 2"/></testcase></testsuite></testsuites>"""
    found = suite.outcomes(ElementTree.fromstring(report))
    assert found == {"passed": 1, "tests_skipped": 1, "failed": "1 of 3 tests", "failures": {"a::d": "1 != 2"}}


def _measurement(run, seconds: float = 0) -> Measurement:
    return Measurement("kernels", "invented", {"images": 2}, seconds, run)


def test_what_goes_wrong_is_a_line(tmp_path: Path) -> None:
    def fail(error: BaseException):
        def run() -> dict:
            raise error

        return command.measured(_measurement(run))

    assert fail(torch.OutOfMemoryError("CUDA out of memory")) == {"skipped": "out of memory"}
    assert fail(ModuleNotFoundError("no", name="pydantic")) == {"skipped": "pydantic is not installed"}
    assert fail(SystemExit("ours: pooled is off by 1.0")) == {"failed": "SystemExit: ours: pooled is off by 1.0"}


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    toy = Bench(torch.device("cpu"), True, 1.0, 1.0, 1.0)
    made: list[str] = []
    seconds = {"first": 0.0, "second": 1000.0}

    def plan(*_):
        for name, needed in seconds.items():
            yield Measurement("kernels", name, {}, needed, lambda n=name: made.append(n) or {"value": 1})

    monkeypatch.setattr(command, "plan", plan)
    for _ in range(2):
        log = Log(tmp_path, "Some GPU")
        assert command.run(toy, log, ["kernels"], time.monotonic() + 100)
    assert made == ["first"] and "1 measurements are left, and too little time" in capsys.readouterr().out
    seconds["second"] = 0.0
    command.run(toy, Log(tmp_path, "Some GPU"), ["kernels"], time.monotonic() + 100)
    assert made == ["first", "second"]
    assert log.path.name.endswith("-some-gpu.jsonl")
    assert [line["name"] for line in read(log.path)] == ["first", "second"]


def test_stops_where_the_device_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the measurements after it would be written down as failed, too, and passed over by the next call."""
    monkeypatch.setattr(command, "plan", lambda *_: [Measurement("kernels", n, {}, 0, dict) for n in ("one", "two")])
    lost = Bench(torch.device("cuda"), True, 1.0, 1.0, 1.0)
    monkeypatch.setattr(command, "usable", lambda device: False)
    log = Log(tmp_path, "Some GPU")
    command.run(lost, log, ["kernels"], time.monotonic() + 100)
    assert [line["name"] for line in read(log.path)] == ["one"]


def test_a_measurement_that_hangs_ends_the_command_and_is_passed_over(tmp_path: Path) -> None:
    child = f"""
import time, pathlib
from benchmarks.gpu import command
from benchmarks.gpu.log import Log, Measurement
log = Log(pathlib.Path({str(tmp_path)!r}), "Some GPU")
measurement = Measurement("kernels", "endless", {{}}, 0, lambda: time.sleep(300))
with command._ended_after(0.1, log, measurement):
    measurement.run()
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", child], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "endless: not over after 0 s" in done.stdout
    assert Log(tmp_path, "Some GPU").has(Measurement("kernels", "endless", {}, 0, dict))


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Bench(torch.device("cpu"), True, 1.0, 1.0, 1.0)
    right = kernels.measure_pairs(toy, 4, 3, "highest", "ours, PyTorch")
    assert right["median_ms"] > 0 and max(right["errors"].values()) < 1e-6
    step = kernels.pairs.step

    def wrong(function, inputs, **options):
        loss, *gradients = step(function, inputs, **options)
        return [loss, *gradients[:-1], gradients[-1] * (1.01 if inputs.pooled.dtype == torch.float32 else 1)]

    monkeypatch.setattr(kernels.pairs, "step", wrong)
    figures = kernels.measure_pairs(toy, 4, 3, "highest", "ours, PyTorch")
    assert "median_ms" not in figures and "off by 1.0e-02" in figures["failed"]


def test_distance_between_curves() -> None:
    expected = torch.tensor([[3.0, 1.0], [4.0, 2.0]]).repeat_interleave(convergence.WINDOW, 1)
    assert convergence.distance_in_spreads(expected, expected) == 0
    assert convergence.distance_in_spreads(expected + 0.5, expected) == pytest.approx(0.5)
    assert convergence.distance_in_spreads(expected + 2, expected) == pytest.approx(2)
