# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Make .venv: the pinned packages, Detectron2, and the compiled ops. `make setup` runs it.

Each step leaves a stamp in .venv/.setup with a hash of what went into it, so that a second run does
nothing, a change redoes only what depends on it, and an interrupted run goes on where it stopped.
It uses the standard library only, of the Python that .venv is to have.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import toolchain
from steps import Problem, Runner, Step, digest, run_logged

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = ROOT / "build" / "setup.log"
LOCK = ROOT / "build" / "setup.lock"

GIGABYTES = 8  # .venv takes 5, the downloads in pip's cache 3
OPS_INPUTS = ("setup.py", "pyproject.toml", "tools/toolchain.py", "csrc/**/*.*")
OPS_VARIABLES = (
    "FORCE_CPU",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "DCN_SANITIZE",
    "CXX",
    "CC",
    "CFLAGS",
    "CXXFLAGS",
    "CPPFLAGS",
    "LDFLAGS",
)


def check_machine() -> None:
    """Say what this machine has; fail where no later step can install what is missing."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise Problem(
            f"{sys.executable} cannot make virtual environments",
            f"`apt install python3-venv` (or {name}-venv), or name another: make setup PYTHON=…",
        )
    try:
        compiler = toolchain.find_compiler()
    except SystemExit as error:
        raise Problem(str(error)) from None
    free = f"{shutil.disk_usage(ROOT).free / 1e9:.0f} GB of disk free"
    print(f"This machine: Python {platform.python_version()}, {compiler}, {free}", flush=True)


def check_disk() -> None:
    """Fail where .venv does not fit."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < GIGABYTES:
        raise Problem(
            f"{ROOT} has {free:.1f} GB of free disk; {GIGABYTES} GB are needed",
            "free some (`pip cache purge` helps), or move the folder to a larger disk",
        )


def tool_environment() -> dict[str, str]:
    """Return the environment for pip: nothing of the user's own packages gets in."""
    environment = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "VIRTUAL_ENV"):
        environment.pop(name, None)
    environment.update(
        PYTHONNOUSERSITE="1",
        PIP_USER="0",
        PIP_NO_INPUT="1",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
    )
    return environment


def run(*command: str | Path) -> str:
    """Run a command into the log; return what it printed."""
    return run_logged([str(word) for word in command], LOG, tool_environment(), ROOT)


def pip(*arguments: str) -> str:
    """Run the pip of .venv."""
    return run(VENV_PYTHON, "-m", "pip", *arguments)


def make_venv(_interrupted: bool) -> None:
    """Make .venv anew."""
    check_disk()
    run(sys.executable, "-m", "venv", "--prompt", "dcn_plugin", VENV)


def install_requirements(_interrupted: bool) -> None:
    """Install the pinned packages."""
    pip("install", "--progress-bar", "off", "-r", "requirements.txt")


def install_detectron2(interrupted: bool) -> None:
    """Install Detectron2; over a half-installed one by force."""
    force = ["--force"] if interrupted else []
    run(VENV_PYTHON, "tools/get_detectron2.py", *force)


def build_ops(_interrupted: bool) -> str:
    """Compile the ops and install the project in editable mode; return a remark."""
    options = ["--no-deps", "--no-build-isolation"]
    # -v brings what the compiler said into the log.
    printed = pip("install", "-v", *options, "-e", ".")
    warnings = printed.count(": warning: ") + printed.count(": warning #")
    return f"{warnings} compiler warnings, see {LOG.relative_to(ROOT)}" if warnings else ""


def ops_inputs() -> Iterator[str]:
    """Yield what the compiled ops depend on, beside the packages."""
    for pattern in OPS_INPUTS:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                yield f"{path.relative_to(ROOT)} {digest([path.read_bytes()])}"
    for name in OPS_VARIABLES:
        yield f"{name}={os.environ.get(name, '')}"
    # A toolkit that was installed, or went away, since the last build.
    yield f"nvcc={shutil.which('nvcc')} {Path('/usr/local/cuda/bin/nvcc').exists()}"


def ops_are_there() -> bool:
    """Tell whether the last build was finished."""
    package = ROOT / "dcn_plugin"
    return (package / "_build_info.json").is_file() and any(package.glob("_C*.so"))


def steps(python: str) -> list[Step]:
    """List the steps, each built upon the one before.

    Args:
        python: The version of Python that .venv has or gets.
    """
    return [
        Step(
            "venv",
            f"Making .venv with Python {python}",
            lambda: [python, str(ROOT)],  # it holds absolute paths: a moved one is made anew
            make_venv,
            lambda: VENV_PYTHON.exists(),
        ),
        Step(
            "packages",
            "Installing the pinned packages (minutes; 3 GB to download the first time)",
            lambda: [(ROOT / "requirements.txt").read_bytes()],
            install_requirements,
        ),
        Step(
            "detectron2",
            "Installing Detectron2 0.6",
            lambda: [(ROOT / "tools" / "get_detectron2.py").read_bytes()],
            install_detectron2,
            lambda: any(VENV.glob("lib/python*/site-packages/detectron2")),
        ),
        Step(
            "ops",
            "Compiling the ops and installing dcn_plugin",
            lambda: list(ops_inputs()),
            build_ops,
            ops_are_there,
        ),
    ]


def choose_python(runner: Runner, explicit: bool) -> str:
    """Return the version of Python for .venv: that of the one that is there, or this one's.

    Args:
        runner: Holds what was recorded about .venv.
        explicit: The user named a Python, so .venv has to have that one.
    """
    mine = platform.python_version()
    recorded = runner.recorded("python")
    if recorded is None or not VENV_PYTHON.exists() or recorded == mine:
        return mine
    if explicit:
        print(f".venv has Python {recorded}, PYTHON is {mine}: making .venv anew", flush=True)
        return mine
    return recorded


def discard_venv() -> None:
    """Remove .venv; at once, so that an interruption leaves no half of it in its place."""
    waste = ROOT / "build" / "discarded-venv"
    shutil.rmtree(waste, ignore_errors=True)
    VENV.rename(waste)
    shutil.rmtree(waste, ignore_errors=True)


def clear_unfinished(runner: Runner, python: str) -> None:
    """Remove a .venv that is not to be kept; never one that somebody else made."""
    if not VENV.exists():
        return
    if not runner.stamps.is_dir() and any(VENV.iterdir()):
        raise Problem(
            ".venv is there, but `make setup` did not make it", "move it away and run it again"
        )
    first, packages = steps(python)[:2]
    # A pip that was killed leaves packages that look installed.
    unfinished = runner.was_interrupted(first) or runner.was_interrupted(packages)
    if unfinished:
        print("The last run did not finish filling .venv: making it anew", flush=True)
    if unfinished or not runner.is_done(first, ""):
        discard_venv()


def set_up(explicit: bool) -> None:
    """Do what is left to do."""
    runner = Runner(VENV / ".setup")
    python = choose_python(runner, explicit)
    if runner.all_done(steps(python)):
        print(f"The environment is ready: .venv, Python {python}")
        return
    check_machine()
    clear_unfinished(runner, python)
    python = choose_python(runner, explicit)  # of the .venv that is left, if any
    runner.stamps.mkdir(parents=True, exist_ok=True)  # marks .venv as ours before it is filled
    runner.record("python", python)
    LOG.write_text("")
    runner.run_all(steps(python))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rebuild-for-python",
        action="store_true",
        help="make .venv anew where it has another Python than the one that runs this",
    )
    options = parser.parse_args(arguments)
    LOCK.parent.mkdir(exist_ok=True)
    try:
        with Runner.alone(LOCK):
            set_up(options.rebuild_for_python)
    except Problem as problem:
        print(f"\nsetup: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next `make setup` goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
