# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""`make gpu-check` with fake commands: its stages, lines and reports. No GPU is needed."""

from __future__ import annotations

import json
import signal
import sys
import time
import zipfile

import gpu_check
import gpu_report
import pytest
from gpu_check import Check, Stage

GPU = {"gpu": "Fake GPU", "torch": "2.11.0", "nvcc": "13.0", "compute-sanitizer": "/bin/sanitizer"}
TESTS = "tests/ops/test_a.py::test_x[1, 2] PASSED [ 50%]\ntests/ops/test_a.py::test_y FAILED [ 99%]"
SUMMARY = "done: a\ndone: b\n========= ERROR SUMMARY: 0 errors"
ROW = {
    "case": "res5", "batch": 1, "dtype": "float32", "threads": 1, "direction": "forward",
    "rival": "dcn_plugin", "layout": "nchw", "supported": True, "median_ms": 0.5, "graph_ms": 0.2,
    "workspace_mib": 1.0, "difference": None,
}  # fmt: skip
ROWS = [
    ROW,
    {**ROW, "rival": "plain conv", "median_ms": 0.25, "graph_ms": 0.1},
    {**ROW, "rival": "torchvision", "median_ms": 1.0, "graph_ms": None, "difference": 2e-6},
]
BENCHMARK = {"environment": {"GPU": "Fake GPU"}, "problems": [], "rows": ROWS}


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path / "report", minutes=9)


def python(script):
    return [sys.executable, "-c", script]


def stage(name, script, read=lambda text: (text.splitlines()[-1], {})):
    return Stage(name, [python(script)], read)


class Machine:
    """Replaces the commands by short scripts: each prints a text and exits with a status."""

    def __init__(self, monkeypatch, tmp_path, **environment):
        self.outputs = {
            "gpu_check.probe": (json.dumps({**GPU, **environment}), 0),
            "build_ext": ("csrc/a.cu(3): warning #1: unused", 0),
            "-m pytest": (TESTS.replace("FAILED", "PASSED"), 0),
            "--tool": (SUMMARY, 0),
            "bench.precompile": ("compiled", 0),
            "tools/benchmark.py": ("", 0),
        }
        self.commands = []
        self.variables = {}  # by command
        self.benchmark = BENCHMARK
        self.output = tmp_path / "report"
        self.start = gpu_check.start_command
        monkeypatch.setattr(gpu_check, "start_command", self)
        monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
        monkeypatch.setattr(gpu_check, "TRITON_CACHE", tmp_path / "triton")
        monkeypatch.setattr(gpu_check, "VENV", tmp_path / ".venv")

    def __call__(self, command, log, variables):
        self.commands.append(" ".join(command))
        self.variables[self.commands[-1]] = variables
        needle = next(needle for needle in self.outputs if needle in self.commands[-1])
        text, status = self.outputs[needle]
        script = f"import sys, pathlib; print({text!r}); "
        if "--json" in command:
            path = command[command.index("--json") + 1]
            script += f"pathlib.Path({path!r}).write_text({json.dumps(self.benchmark)!r}); "
        return self.start(python(f"{script}sys.exit({status})"), log, variables)

    def run(self, *arguments):
        gpu_check.main(["--output", str(self.output), *arguments])

    def sanitized(self):
        return [command for command in self.commands if "--tool" in command]

    def report(self):
        report = json.loads((self.output / "report.json").read_text())
        return {stage["name"]: stage for stage in report["stages"]}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path, deformops="3.0.1")


class TestStages:
    def test_a_line_per_stage_in_order(self, machine, capsys):
        machine.run()
        lines = capsys.readouterr().out.splitlines()
        assert [line[:16].strip() for line in lines[:-1]] == list(gpu_check.SECONDS)
        status = {line[:16].strip(): line[16:] for line in lines[:-1]}
        assert status["wheels"].endswith("s  skipped  no --wheels")
        assert status["environment"].endswith("ok       Fake GPU, torch 2.11.0, nvcc 13.0")
        assert status["build"].endswith("ok       1 warnings")
        assert status["CUDA tests"].endswith("ok       2 passed")
        assert status["racecheck"].endswith("ok       0 errors in 2 calls")
        assert status["deformops"].endswith("ok       kernels compiled")
        assert status["benchmark roi"].endswith("ok       3 rows")

    def test_the_build_is_for_cuda_and_makes_that_of_venv_stale(self, machine, tmp_path):
        done = tmp_path / ".venv" / ".setup" / "ops.done"
        done.parent.mkdir(parents=True)
        done.touch()
        machine.run()
        assert not done.exists()
        build = next(c for c in machine.commands if "build_ext" in c)
        assert machine.variables[build] == {"FORCE_CUDA": "1"}

    @pytest.mark.parametrize(
        ("command", "stage"),
        [
            ("--tool", "memcheck"),
            ("-m pytest", "CUDA tests"),
            ("tools/benchmark.py", "benchmark roi"),
            ("gpu_check.probe", "environment"),
        ],
    )
    def test_a_command_without_a_result_fails_its_stage(self, machine, command, stage):
        machine.outputs[command] = ("nothing", 0)
        machine.benchmark = {**BENCHMARK, "rows": []}
        with pytest.raises(SystemExit, match=stage):
            machine.run()
        assert machine.report()[stage]["log_end"] == "nothing"

    def test_racecheck_runs_a_few_calls(self, machine):
        machine.run()
        calls = {c.split()[2]: c.split("sanitizer_calls cuda")[1] for c in machine.sanitized()}
        assert calls == {"memcheck": " ", "racecheck": " wide-torch.float32", "initcheck": " "}

    def test_stages_that_do_not_need_the_failed_one_run(self, machine):
        machine.outputs["-m pytest"] = (TESTS, 1)
        with pytest.raises(SystemExit, match=r"^gpu_check: failed: CUDA tests$"):
            machine.run()
        report = machine.report()
        assert {stage["status"] for name, stage in report.items() if name != "CUDA tests"} == {
            "ok", "skipped",
        }  # fmt: skip
        assert report["CUDA tests"]["detail"] == "exit status 1; 1 failed, 1 passed"
        assert report["benchmark conv"]["measured"]["rows"] == ROWS
        text = (machine.output / "report.md").read_text()
        assert "# GPU check: FAILED: CUDA tests\n" in text
        assert "- `tests/ops/test_a.py::test_y`" in text

    def test_what_needs_the_build_is_skipped_if_it_fails(self, machine):
        machine.outputs["build_ext"] = ("error: no compiler", 2)
        with pytest.raises(SystemExit, match=r"^gpu_check: failed: build$"):
            machine.run()
        assert not any("-m pytest" in command for command in machine.commands)
        later = [s for name, s in machine.report().items() if name in list(gpu_check.SECONDS)[3:]]
        assert {(s["status"], s["detail"]) for s in later} == {("skipped", "the build failed")}
        assert "error: no compiler" in (machine.output / "report.md").read_text()

    def test_deformops_is_left_out_of_the_benchmark_if_its_kernels_do_not_compile(self, machine):
        machine.outputs["bench.precompile"] = ("no Triton", 1)
        with pytest.raises(SystemExit, match="deformops"):
            machine.run()
        conv, roi = (c for c in machine.commands if "benchmark.py" in c)
        assert conv.endswith("--without deformops")
        assert "--without" not in roi
        assert machine.report()["deformops"]["log_end"].endswith("\nno Triton")

    def test_disturbed_timings_of_the_autotuner_are_removed(self, machine, tmp_path):
        timings = tmp_path / "triton" / "x" / "kernel.autotune.json"
        timings.parent.mkdir(parents=True)
        timings.touch()
        machine.run()
        assert not timings.exists()
        assert timings.parent.exists()

    def test_what_is_not_installed_is_skipped(self, monkeypatch, tmp_path):
        machine = Machine(monkeypatch, tmp_path, **{"compute-sanitizer": None})
        machine.run()
        report = machine.report()
        assert report["initcheck"]["detail"] == "compute-sanitizer is not installed"
        assert report["deformops"]["detail"] == "not installed"
        conv = next(command for command in machine.commands if "benchmark.py" in command)
        assert "--without deformops" in conv


class TestWithoutGpu:
    def test_every_stage_says_so_and_the_emulator_runs_the_tests(
        self, monkeypatch, tmp_path, capsys
    ):
        machine = Machine(monkeypatch, tmp_path, gpu=None)
        machine.outputs["make emulate"] = (
            "7 passed, 1 skipped in 3.21s (0:00:03)\n2 passed in 1s",
            0,
        )
        gpu_check.VENV.mkdir()
        machine.run()
        for line in capsys.readouterr().out.splitlines()[2:-1]:
            assert "no GPU" in line
        assert machine.variables["make emulate"]["PYTHON"] == str(tmp_path / ".venv/bin/python")
        assert machine.report()["CUDA tests"]["detail"] == (
            "no GPU: in the emulator, 9 passed, 1 skipped"
        )

    def test_without_venv_nothing_is_installed(self, monkeypatch, tmp_path):
        machine = Machine(monkeypatch, tmp_path, gpu=None)
        machine.run()
        assert not any("make" in command for command in machine.commands)
        assert machine.report()["CUDA tests"]["status"] == "skipped"

    def test_broken_pytorch_is_a_failure(self, monkeypatch, tmp_path):
        machine = Machine(monkeypatch, tmp_path)
        machine.outputs["gpu_check.probe"] = ("ModuleNotFoundError: torch", 1)
        with pytest.raises(SystemExit, match="environment"):
            machine.run()
        report = machine.report()
        assert report["environment"]["detail"] == "exit status 1; PyTorch does not work"
        assert report["build"]["detail"] == "PyTorch does not work"


class TestTime:
    def test_a_stage_out_of_time_is_ended_with_its_children_and_keeps_its_output(
        self, check, monkeypatch, tmp_path
    ):
        monkeypatch.setattr(Check, "limit", lambda self, name: 4)
        monkeypatch.setattr(gpu_check, "GRACE", 0.5)
        script = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("half a result")
time.sleep(60)
"""
        start = time.monotonic()
        check.run(stage("build", script))
        assert time.monotonic() - start < 20
        result = check.results["build"]
        assert (result.status, result.detail) == ("FAILED", "out of time after 4 s; half a result")
        status = tmp_path.joinpath("/proc", (tmp_path / "pid").read_text(), "status")
        while running(status) and time.monotonic() - start < 20:
            time.sleep(0.05)  # the kernel ends it in its own time
        assert not running(status)

    @pytest.mark.parametrize("ignored", [False, True], ids=["foreground", "background"])
    def test_an_interrupted_stage_may_finish_its_report(self, check, monkeypatch, ignored):
        monkeypatch.setattr(Check, "limit", lambda self, name: 4)
        script = """
import time
try:
    print("started"); time.sleep(60)
except KeyboardInterrupt:
    print("2 passed, 1 failed")
"""
        # A shell without job control ignores SIGINT in commands that it starts with &.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None
        try:
            check.run(stage("build", script))
        finally:
            if ignored:
                signal.signal(signal.SIGINT, handler)
        assert check.results["build"].detail.endswith("; 2 passed, 1 failed")

    def test_time_that_is_left_is_shared_by_the_later_stages(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
        check = Check(tmp_path, minutes=9)
        total = sum(gpu_check.SECONDS.values())
        assert total == 540
        assert check.limit("wheels") == pytest.approx(535 * 30 / total)
        assert check.limit("benchmark roi") == pytest.approx(535)
        now[0] = 600.0
        assert check.limit("benchmark roi") == 0.0
        check.planned = ["CUDA tests"]
        now[0] = 100.0
        assert check.limit("CUDA tests") == pytest.approx(435)

    def test_the_reports_exist_after_every_stage(self, check):
        check.run(stage("build", "print('built')"))
        report = json.loads((check.output / "report.json").read_text())
        assert [s["name"] for s in report["stages"]] == ["build"]
        assert not report["ok"]
        assert "benchmark roi" in report["not_run"]
        assert "Not run: wheels" in (check.output / "report.md").read_text()
        assert "built" in (check.output / "log.txt").read_text()

    def test_an_unknown_output_is_a_failure_and_no_crash(self, check):
        check.run(stage("build", "pass", read=lambda text: json.loads("")))
        assert check.results["build"].status == "FAILED"
        assert "output not understood" in check.results["build"].detail


def running(status):
    """Returns whether a process exists and is not a zombie."""
    try:
        return "State:\tZ" not in status.read_text()
    except FileNotFoundError:
        return False


def test_wheels_are_installed_one_by_one_beside_the_environment(check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for tag in ("py3-none-any", "cp27-cp27m-win32"):
        name = f"fits_{tag[:3]}"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-1.0-{tag}.whl", "w") as file:
            file.writestr(f"{name}.py", "")
            file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0")
            file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}")
            file.writestr(f"{info}/RECORD", "")
    gpu_check.run_wheels(check, wheels)
    assert check.results["wheels"].detail == "exit status 1; 2 wheels"
    assert (tmp_path / "site" / "fits_py3.py").exists()


class TestRead:
    def test_tests_with_and_without_xdist(self):
        xdist = "[gw1] [  3%] PASSED tests/a.py::b[x] \n[gw0] [ 10%] ERROR tests/a.py::c \n"
        detail, measured = gpu_report.read_tests(f"{xdist}{TESTS}\nFAILED tests/ops/test_a.py - x")
        assert detail == "1 error, 1 failed, 2 passed"
        assert measured["failed"] == ["tests/a.py::c", "tests/ops/test_a.py::test_y"]
        detail, measured = gpu_report.read_tests("No module named pytest")
        assert (detail, measured["missing"]) == ("no test ran", True)

    def test_sanitizer(self):
        text = """done: a
========= Invalid __global__ read of size 4 bytes
=========     at void dcn::cuda::<unnamed>::im2col_kernel<float, float, (int)4>(T1)+0x1b0
=========     by thread (31,0,0) in block (0,0,0)
=========     Address 0x7f2a4be00400 is out of bounds
========= Invalid __global__ read of size 16 bytes
=========     at void dcn::cuda::(anonymous namespace)::im2col_kernel<double, double, 2>(T1)+0x90
========= Invalid __global__ write of size 4 bytes
=========     at cell_bits_kernel(Params)+0x10 in roi_pool_deterministic.cu:81
========= ERROR SUMMARY: 3 errors"""
        detail, measured = gpu_report.read_sanitizer(text)
        assert detail == "3 errors in 1 calls"
        assert measured["kernels"] == {"dcn::cuda::im2col_kernel": 2, "cell_bits_kernel": 1}
        assert "missing" not in measured
        race = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
        assert gpu_report.read_sanitizer(race)[1]["errors"] == 2
        detail, measured = gpu_report.read_sanitizer("done: a")
        assert (detail, measured["missing"]) == ("no summary in 1 calls", True)

    def test_a_sanitizer_that_refuses_the_device_is_skipped(self, check):
        read = gpu_report.read_sanitizer
        check.run(stage("memcheck", "import sys; sys.exit('Device not supported')", read))
        assert check.results["memcheck"].status == "skipped"

    def test_the_benchmark_table_prefers_cuda_graphs(self):
        lines = list(gpu_report.benchmark_table(BENCHMARK))
        cells = [[cell.strip() for cell in line.split("|")[5:-1]] for line in lines[-3:]]
        assert cells[0] == ["dcn_plugin", "nchw", "0.500", "0.200", "2.00", "0.50", "1.0", ""]
        assert cells[2] == ["torchvision", "nchw", "1.000", "", "4.00", "1.00", "1.0", "2e-06"]


def test_the_probe_finds_this_environment():
    found = json.loads(gpu_check.probe())
    assert {"gpu", "nvcc", "compute-sanitizer", "torch", "pytest"} <= set(found)
