# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The set-up: requirements, toolchain, `make setup`, and the edits of Detectron2."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import get_detectron2
import pytest
import toolchain
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def requirements(python: str) -> list[Requirement]:
    """Returns the requirements that apply to one version of Python."""
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

    @pytest.fixture(autouse=True)
    def _no_variables(self, monkeypatch) -> None:
        for name in ("FORCE_CPU", "FORCE_CUDA", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize("force_cuda", ["0", "1"])
    def test_compiles_cuda_if_the_major_versions_match(self, force_cuda, monkeypatch) -> None:
        monkeypatch.setenv("FORCE_CUDA", force_cuda)
        assert toolchain.why_no_cuda("13.2", self.TOOLKIT) is None

    @pytest.mark.parametrize(
        ("torch_cuda", "toolkit", "sanitize", "reason"),
        [
            (None, TOOLKIT, "", "PyTorch is built without CUDA"),
            ("13.0", None, "", "no CUDA toolkit was found"),
            ("12.8", TOOLKIT, "", "is 13.0, while PyTorch is built for CUDA 12.8"),
            ("13.0", TOOLKIT, "address", "DCN_SANITIZE"),
        ],
    )
    def test_gives_the_reason_against_cuda(
        self, torch_cuda, toolkit, sanitize, reason, monkeypatch
    ) -> None:
        assert reason in toolchain.why_no_cuda(torch_cuda, toolkit, sanitize)
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(SystemExit, match=f"FORCE_CUDA.*{reason}"):
            toolchain.why_no_cuda(torch_cuda, toolkit, sanitize)

    def test_force_cpu_excludes_force_cuda(self, monkeypatch) -> None:
        monkeypatch.setenv("FORCE_CPU", "1")
        assert toolchain.why_no_cuda("13.0", self.TOOLKIT) == "FORCE_CPU is set"
        monkeypatch.setenv("FORCE_CUDA", "1")
        with pytest.raises(SystemExit, match="exclude each other"):
            toolchain.why_no_cuda("13.0", self.TOOLKIT)


class TestToolchain:
    def test_finds_the_toolkit_behind_a_wrapper_script(self, tmp_path, monkeypatch) -> None:
        home, wrapper = tmp_path / "cuda-99.1", tmp_path / "bin" / "nvcc"
        (home / "include").mkdir(parents=True)
        (home / "include" / "cuda_runtime.h").touch()
        script(
            home / "bin" / "nvcc",
            f'case "$1" in --dryrun) echo "#$ _HERE_={home}/bin" ;; *) echo release 99.1, ;; esac',
        )
        script(wrapper, f'exec "{home}/bin/nvcc" "$@"')
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:/usr/bin:/bin")
        assert toolchain.find_toolkit() == toolchain.Toolkit(home, "99.1")

    def test_a_wrong_cuda_home_is_not_replaced_by_another_toolkit(
        self, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert toolchain.find_toolkit() is None

    def test_the_cpp_standard_is_that_of_pytorchs_build(self) -> None:
        build = Path(cpp_extension.__file__).read_text()
        assert f"'{toolchain.cpp_standard(torch.__version__)}'" in build
        assert toolchain.cpp_standard("2.13.1+cpu") == "-std=c++17"
        assert toolchain.cpp_standard("2.14.0a0") == "-std=c++20"

    def test_architectures_are_split_as_pytorch_does(self) -> None:
        assert toolchain.parse_archs("8.0; 9.0+PTX 10.0,") == ["8.0", "9.0+PTX", "10.0"]

    @pytest.mark.parametrize(
        ("version", "supported", "chosen"),
        [
            ("13.0", "75 80 86 87 89 90 100 110 120", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
            ("12.6", "50 52 60 61 70 75 80 86 87 89 90 90a", "7.5;8.0;8.6;8.9;9.0+PTX"),
            ("11.1", "35 50 52 60 61 70 75 80 86", "7.5;8.0;8.6+PTX"),
        ],
    )
    def test_a_release_is_for_the_architectures_that_the_toolkit_supports(
        self, tmp_path, version, supported, chosen
    ) -> None:
        listed = [f"compute_{number}" for number in supported.split()]
        script(tmp_path / "bin" / "nvcc", f"printf '%s\\n' {' '.join(listed)}")
        assert toolchain.release_archs(toolchain.Toolkit(tmp_path, version)) == chosen

    @pytest.mark.parametrize("listed", ["", "compute_60 compute_70"])
    def test_a_toolkit_too_old_for_a_release_is_an_error(self, tmp_path, listed) -> None:
        script(tmp_path / "bin" / "nvcc", f"printf '%s\\n' {listed}")
        with pytest.raises(SystemExit, match=r"toolkit 9\.2 in .* none of 7\.5, ") as error:
            toolchain.release_archs(toolchain.Toolkit(tmp_path, "9.2"))
        assert "\n" not in str(error.value)

    def test_a_missing_compiler_is_a_one_line_error(self, monkeypatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(
            SystemExit, match=r"no-such-compiler was not found.*apt install g"
        ) as error:
            toolchain.find_compiler()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("command", "minor_version_only"),
        [(["dist_info", "--output-dir"], True), (["egg_info", "--egg-base"], False)],
        ids=["of a wheel or an editable install", "of a source distribution"],
    )
    def test_metadata_require_the_pytorch_that_the_ops_were_compiled_for(
        self, tmp_path, command, minor_version_only
    ) -> None:
        subprocess.run(
            [sys.executable, "setup.py", "-q", *command, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "FORCE_CPU": "1", "FORCE_CUDA": "0"},
            check=True,
            capture_output=True,
        )
        (distribution,) = metadata.distributions(name="dcn_plugin", path=[str(tmp_path)])
        required = [r for r in map(Requirement, distribution.requires or []) if r.marker is None]
        assert [r.name for r in required] == ["torch"]
        accepted = required[0].specifier
        assert accepted.contains(torch.__version__, prereleases=True)
        release = Version(torch.__version__).release
        other = f"{release[0]}.{release[1] + 1}.0"
        assert accepted.contains(other) == (not minor_version_only)
        assert not accepted.contains("2.5.1")

    def test_missing_pytorch_is_a_one_line_error(self, tmp_path) -> None:
        (tmp_path / "torch.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        )
        done = subprocess.run(
            [sys.executable, str(ROOT / "setup.py"), "--version"],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert re.fullmatch(r"[^\n]+install PyTorch first[^\n]+\n", done.stderr)


def script(path: Path, text: str) -> None:
    """Writes a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# Stands in for Python and pip: notes what it is asked for, and fails where a file FAIL says so.
FAKE_PYTHON = """
case "$*" in
  "-m venv "*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; step=venv ;;
  "-m pip install"*requirements.txt) step=packages ;;
  *get_detectron2.py*) step=detectron2 ;;
  "-m pip install -v"*) step=ops; touch dcn_plugin/_build_info.json ;;
  *platform*) echo ${FAKE_VERSION:-3.11.7}; exit ;;
  *) exec {python} -S "$@" ;;
esac
echo $step >> calls.txt
if [ "$(cat FAIL)" = $step ]; then echo "$step does not work"; exit 1; fi
"""


class TestMakeSetup:
    """`make setup` in a copy of the project with stand-ins for Python, pip and df."""

    ALL = ("venv", "packages", "detectron2", "ops")

    @pytest.fixture
    def project(self, tmp_path) -> Path:
        for name in ("Makefile", "requirements.txt", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        for name in ("toolchain.py", "get_detectron2.py"):
            (tmp_path / "tools").mkdir(exist_ok=True)
            shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
        (tmp_path / "csrc/cpu").mkdir(parents=True)
        (tmp_path / "csrc/cpu/a.cpp").touch()
        (tmp_path / "csrc/cpu/b.cpp").touch()
        (tmp_path / "dcn_plugin").mkdir()
        (tmp_path / "FAIL").touch()
        script(tmp_path / "python", FAKE_PYTHON.replace("{python}", sys.executable))
        script(tmp_path / "bin/df", "echo head; echo disk 9 9 ${FREE_DISK:-8000000} 9% /")
        return tmp_path

    def make(self, project: Path, *words: str, error: str | None = None) -> tuple[str, ...]:
        """Runs `make setup`; returns the steps that it took."""
        (project / "calls.txt").write_text("")
        environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_CPU", "MAKEFLAGS")}
        environment["PATH"] = f"{project}/bin:{environment['PATH']}"
        command = ["make", "setup", *(words or ("PYTHON=./python",))]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode != 0) == (error is not None), done.stdout + done.stderr
        assert error is None or re.search(error, done.stdout + done.stderr)
        return tuple((project / "calls.txt").read_text().split())

    def test_takes_the_steps_that_depend_on_a_change(self, project) -> None:
        assert self.make(project) == self.ALL
        assert self.make(project) == ()
        (project / "csrc/cpu/a.cpp").touch()
        assert self.make(project) == ("ops",)
        (project / "csrc/cpu/b.cpp").unlink()
        assert self.make(project) == ("ops",)
        assert self.make(project, "PYTHON=./python", "FORCE_CPU=1") == ("ops",)
        assert self.make(project, "PYTHON=./python", "FORCE_CPU=1") == ()
        (project / "dcn_plugin/_build_info.json").unlink()  # by `make clean`
        assert self.make(project, "PYTHON=./python", "FORCE_CPU=1") == ("ops",)

    def test_resumes_after_a_failure(self, project) -> None:
        (project / "FAIL").write_text("packages")
        assert self.make(project, error="packages does not work") == self.ALL[:2]
        (project / "FAIL").write_text("ops")  # half-installed packages: .venv is created anew
        assert self.make(project, error="ops does not work") == self.ALL
        assert "ops does not work" in (project / "build/setup.log").read_text()
        (project / "FAIL").write_text("")
        assert self.make(project) == ("ops",)

    def test_another_python_replaces_the_environment(self, project, monkeypatch) -> None:
        self.make(project)
        moved = project.with_name("moved")
        project.rename(moved)
        assert self.make(moved) == self.ALL  # it contains absolute paths
        script(moved / "python3", FAKE_PYTHON.replace("{python}", sys.executable))
        text = (moved / "python").read_text().replace("3.11.7", "3.12.1")
        (moved / "python").write_text(text)
        assert self.make(moved) == self.ALL
        monkeypatch.setenv("PATH", f"{moved}:{os.environ['PATH']}")
        assert self.make(moved, "BENCH_ARGS=") == ()  # the default python3 does not

    def test_an_environment_of_the_user_is_not_touched(self, project) -> None:
        (project / ".venv").mkdir()
        assert self.make(project, error="did not create it: move it away") == ()

    @pytest.mark.parametrize(
        ("case", "error"),
        [
            (
                '*version_info*) exit 1 ;; --version) echo "Python 3.8" ;;',
                "is Python 3.8, but 3.10",
            ),
            ("*ensurepip*) exit 1 ;;", "cannot create virtual environments: apt install"),
            ('*find_compiler*) CXX=none {python} -S "$@"; exit ;;', r"a C\+\+17 compiler"),
        ],
    )
    def test_what_the_machine_lacks_is_named(self, project, case, error) -> None:
        text = FAKE_PYTHON.replace("in\n", f"in\n  {case}\n", 1).replace("{python}", sys.executable)
        script(project / "python", text)
        assert self.make(project, error=error) == ()

    def test_a_full_disk_and_a_missing_python_are_named(self, project, monkeypatch) -> None:
        assert self.make(project, "PYTHON=no-python", error="no-python was not found") == ()
        monkeypatch.setenv("FREE_DISK", "7999999")
        assert self.make(project, error="has 7 GB of free disk, but 8 GB are needed") == ()


class TestDetectron2Edits:
    @pytest.fixture
    def tree(self, tmp_path) -> Path:
        """A source tree in which each edit finds its text as often as expected."""
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
