# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The set-up: requirements, stamps, the choice between CUDA and CPU, Detectron2's edits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import get_detectron2
import pytest
import steps
import toolchain
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(python: str) -> list[Requirement]:
    """Return the requirements that hold for one version of Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"python_version": python})]


class TestRequirements:
    @pytest.mark.parametrize("python", PYTHONS)
    def test_each_package_has_one_exact_pin_on_every_python(self, python: str) -> None:
        found = requirements(python)
        names = [r.name for r in found]
        assert sorted(set(names)) == sorted(names)
        assert all([s.operator for s in r.specifier] == ["=="] for r in found)

    def test_every_python_gets_the_same_packages(self) -> None:
        sets = {python: {r.name for r in requirements(python)} for python in PYTHONS}
        assert len(set(map(frozenset, sets.values()))) == 1, sets


class TestWhyNoCuda:
    TOOLKIT = toolchain.Toolkit(Path("/cuda"), "13.0")

    def test_builds_cuda_where_the_major_versions_match(self) -> None:
        assert toolchain.why_no_cuda("13.2", self.TOOLKIT) is None
        assert toolchain.why_no_cuda("13.2", self.TOOLKIT, force_cuda=True) is None

    @pytest.mark.parametrize(
        ("torch_cuda", "toolkit", "options", "reason"),
        [
            (None, TOOLKIT, {}, "PyTorch is built without CUDA"),
            ("13.0", None, {}, "no CUDA toolkit was found"),
            ("12.8", TOOLKIT, {}, "is 13.0, while PyTorch is built for CUDA 12.8"),
            ("13.0", TOOLKIT, {"force_cpu": True}, "FORCE_CPU"),
            ("13.0", TOOLKIT, {"sanitize": "address"}, "DCN_SANITIZE"),
        ],
    )
    def test_says_why_not(self, torch_cuda, toolkit, options, reason) -> None:
        assert reason in toolchain.why_no_cuda(torch_cuda, toolkit, **options)
        with pytest.raises(SystemExit, match="FORCE_CUDA"):
            toolchain.why_no_cuda(torch_cuda, toolkit, force_cuda=True, **options)


class TestToolchain:
    def test_finds_the_toolkit_behind_a_wrapper_script(self, tmp_path, monkeypatch) -> None:
        home, wrapper = tmp_path / "cuda-99.1", tmp_path / "bin" / "nvcc"
        (home / "include").mkdir(parents=True)
        (home / "include" / "cuda_runtime.h").touch()
        says = (
            f'case "$1" in --dryrun) echo "#$ _HERE_={home}/bin" ;; *) echo release 99.1, ;; esac'
        )
        script(home / "bin" / "nvcc", says)
        script(wrapper, f'exec "{home}/bin/nvcc" "$@"')
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
        assert toolchain.find_toolkit() == toolchain.Toolkit(home, "99.1")

    def test_cuda_home_that_holds_no_toolkit_is_not_replaced(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert toolchain.find_toolkit() is None

    def test_architectures_follow_the_gpus_as_far_as_pytorch_knows_them(self) -> None:
        known = ["sm_80", "sm_90", "compute_90"]
        assert toolchain.default_archs([], known) == "8.0+PTX"
        assert toolchain.default_archs([(9, 0), (8, 0), (9, 0)], known) == "8.0;9.0+PTX"
        assert toolchain.default_archs([(12, 0)], known) == "9.0+PTX"
        assert toolchain.parse_archs("8.0; 9.0+PTX 10.0,") == ["8.0", "9.0+PTX", "10.0"]

    @pytest.mark.parametrize(
        ("version", "known", "chosen"),
        [
            ("13.0", "75 80 86 87 89 90 100 110 120", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
            ("12.6", "50 52 60 61 70 75 80 86 87 89 90 90a", "7.5;8.0;8.6;8.9;9.0+PTX"),
            ("11.1", "35 50 52 60 61 70 75 80 86", "7.5;8.0;8.6+PTX"),
        ],
    )
    def test_a_release_is_for_what_the_toolkit_compiles_for(
        self, tmp_path, version, known, chosen
    ) -> None:
        listed = [f"compute_{number}" for number in known.split()]
        script(tmp_path / "bin" / "nvcc", f"printf '%s\\n' {' '.join(listed)}")
        toolkit = toolchain.Toolkit(tmp_path, version)
        assert toolchain.toolkit_archs(toolkit) == listed
        assert toolchain.release_archs(toolkit, listed) == chosen

    def test_a_toolkit_too_old_for_any_release_architecture_says_so(self, tmp_path) -> None:
        toolkit = toolchain.Toolkit(tmp_path, "9.2")
        assert toolchain.toolkit_archs(toolkit) == []  # its nvcc does not run
        for known in ([], ["compute_60", "compute_70"]):
            with pytest.raises(SystemExit, match=r"toolkit 9\.2 in .* for none of 7\.5, ") as error:
                toolchain.release_archs(toolkit, known)
            assert "\n" not in str(error.value)

    def test_no_compiler_is_one_line_with_what_to_do(self, monkeypatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(SystemExit, match="apt install g") as error:
            toolchain.find_compiler()
        assert "\n" not in str(error.value)

    def test_no_pytorch_is_one_line_with_what_to_do(self, tmp_path) -> None:
        (tmp_path / "torch.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, str(ROOT / "setup.py"), "--version"],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert re.fullmatch(r"[^\n]+install PyTorch first[^\n]+\n", done.stderr)


def script(path: Path, text: str) -> None:
    """Write a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class Recorder:
    """Two steps, the second built upon the first, and a list of what was run."""

    def __init__(self, folder: Path) -> None:
        """Start with nothing done."""
        self.runner = steps.Runner(folder / ".setup")
        self.inputs = {"first": "a", "second": "b"}
        self.ran: list[tuple[str, bool]] = []
        self.fail: type[BaseException] | None = None
        self.there = True

    def steps(self) -> list[steps.Step]:
        """Return the steps with the inputs of now."""
        return [self._step("first"), self._step("second")]

    def _step(self, name: str) -> steps.Step:
        def action(interrupted: bool) -> None:
            self.ran.append((name, interrupted))
            if self.fail is not None and name == "second":
                raise self.fail("it stopped")

        return steps.Step(name, name, lambda: [self.inputs[name]], action, lambda: self.there)

    def run(self) -> list[tuple[str, bool]]:
        """Run what is left; return the names with whether an earlier attempt was cut short."""
        self.ran = []
        self.runner.run_all(self.steps())
        return self.ran


class TestSteps:
    @pytest.fixture
    def recorder(self, tmp_path) -> Recorder:
        return Recorder(tmp_path)

    def test_a_second_run_does_nothing(self, recorder) -> None:
        assert not recorder.runner.all_done(recorder.steps())
        assert recorder.run() == [("first", False), ("second", False)]
        assert recorder.runner.all_done(recorder.steps())
        assert recorder.run() == []

    def test_a_change_redoes_what_depends_on_it(self, recorder) -> None:
        recorder.run()
        recorder.inputs["second"] = "c"
        assert recorder.run() == [("second", False)]
        recorder.inputs["first"] = "c"
        assert recorder.run() == [("first", False), ("second", False)]

    def test_an_interrupted_step_is_redone_and_knows_it(self, recorder) -> None:
        recorder.fail = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            recorder.run()
        recorder.fail = None
        assert recorder.run() == [("second", True)]
        assert recorder.run() == []

    def test_an_interrupted_repetition_does_not_count_as_the_first_success(self, recorder) -> None:
        recorder.run()
        recorder.inputs["second"], recorder.fail = "c", KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            recorder.run()
        recorder.inputs["second"], recorder.fail = "b", None
        assert recorder.run() == [("second", True)]

    def test_a_result_that_went_away_is_made_again(self, recorder) -> None:
        recorder.run()
        recorder.there = False
        assert not recorder.runner.all_done(recorder.steps())

    def test_a_failed_step_is_named(self, recorder) -> None:
        recorder.fail = steps.Problem
        with pytest.raises(steps.Problem, match=r"'second' failed. it stopped"):
            recorder.run()

    @pytest.mark.parametrize(
        ("printed", "advice"),
        [
            ("OSError: [Errno 28] No space left on device", "free some space"),
            ("fatal error: Python.h: No such file or directory", "python3-dev"),
            ("NewConnectionError: Failed to establish\nERROR: No matching distribution", "network"),
        ],
    )
    def test_a_failed_tool_shows_its_end_and_what_to_do(self, tmp_path, printed, advice) -> None:
        log = tmp_path / "log"
        script(tmp_path / "tool", f"echo '{printed}'; exit 3")
        with pytest.raises(steps.Problem) as problem:
            steps.run_logged([str(tmp_path / "tool")], log, dict(os.environ), tmp_path)
        assert printed.splitlines()[0] in str(problem.value)
        assert advice in str(problem.value).splitlines()[-1]
        assert printed in log.read_text()


class TestDetectron2Edits:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        """A tree in which each edit finds its text exactly as often as it says."""
        for edit in get_detectron2.EDITS:
            path = tmp_path / edit.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write((edit.old + "\n") * edit.count)
        return tmp_path

    def test_every_old_text_is_replaced(self, tree) -> None:
        get_detectron2.apply_edits(tree)
        assert 'name="detectron2"' in (tree / "setup.py").read_text()
        for edit in get_detectron2.EDITS:
            if edit.old not in edit.new:
                assert edit.old not in (tree / edit.file).read_text()
        with pytest.raises(get_detectron2.InstallError):
            get_detectron2.apply_edits(tree)

    def test_a_missing_text_is_named(self, tree) -> None:
        edit = get_detectron2.EDITS[-1]
        (tree / edit.file).write_text("import pkg_resources\n")
        with pytest.raises(get_detectron2.InstallError, match=rf"{edit.file}.*found 0 times"):
            get_detectron2.apply_edits(tree)

    def test_a_missing_file_is_named(self, tree) -> None:
        (tree / "setup.py").unlink()
        with pytest.raises(get_detectron2.InstallError, match=r"setup\.py is not in"):
            get_detectron2.apply_edits(tree)
