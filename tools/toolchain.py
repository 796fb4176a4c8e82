# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What there is to compile with, and what follows from it: used by setup.py.

Nothing here imports PyTorch or setuptools, so that it can be asked about both.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Every GPU from Ampere on: its own code for 8.0, compiled by the driver for the later ones.
DEFAULT_ARCHS = "8.0+PTX"

# What TORCH_CUDA_ARCH_LIST=release stands for, as far as the toolkit compiles for it: the code of
# each generation of GPUs, and PTX of the newest for those to come.
RELEASE_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

NO_COMPILER = (
    "dcn_plugin needs a C++17 compiler and there is none: install one (on Debian and Ubuntu "
    "`apt install g++`), or name it in CXX"
)


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder and its version, as "13.0"."""

    home: Path
    version: str


def flag(name: str) -> bool:
    """Tell whether an on/off environment variable is on."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "off", "no", "false")


def command_output(*command: str) -> str:
    """Return what a command prints to both streams, or nothing where it does not run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def toolkit_candidates() -> list[Path]:
    """List the folders that may hold the CUDA toolkit, the likeliest first."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    found = []
    nvcc = shutil.which("nvcc")
    if nvcc:
        # The nvcc in PATH may be a script, so it is asked where the real one lies.
        dry_run = command_output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
        here = re.search(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
        if here:
            found.append(Path(here[1].strip()).parent)
        found.append(Path(nvcc).resolve().parent.parent)
    found.append(Path("/usr/local/cuda"))
    found += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    found.append(Path("/opt/cuda"))
    return found


def find_toolkit() -> Toolkit | None:
    """Return the first toolkit whose nvcc runs and whose CUDA runtime header is there."""
    for home in toolkit_candidates():
        headers = [home / "include", *home.glob("targets/*/include")]
        if not any((folder / "cuda_runtime.h").is_file() for folder in headers):
            continue
        release = re.search(
            r"release (\d+\.\d+)", command_output(str(home / "bin" / "nvcc"), "--version")
        )
        if release:
            return Toolkit(home, release[1])
    return None


def why_no_cuda(
    torch_cuda: str | None,
    toolkit: Toolkit | None,
    *,
    force_cpu: bool = False,
    force_cuda: bool = False,
    sanitize: str = "",
) -> str | None:
    """Decide whether the CUDA sources are built.

    Args:
        torch_cuda: The CUDA version of PyTorch, as "13.0"; None for a build without CUDA.
        toolkit: The CUDA toolkit, where there is one.
        force_cpu: The user wants no CUDA.
        force_cuda: The user wants an error rather than no CUDA.
        sanitize: The sanitizers that were asked for.

    Returns:
        None where they are built, else the reason why not, as a phrase.
    """
    if force_cpu and force_cuda:
        raise SystemExit("FORCE_CPU=1 and FORCE_CUDA=1 exclude each other: unset one of them")
    if force_cpu:
        return "FORCE_CPU is set"
    if sanitize:
        reason = "DCN_SANITIZE builds the C++ sources only"
    elif torch_cuda is None:
        reason = "PyTorch is built without CUDA"
    elif toolkit is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"in CUDA_HOME={named}" if named else "(set CUDA_HOME to the folder of one)"
        reason = f"no CUDA toolkit was found {where}"
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        reason = (
            f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, "
            f"while PyTorch is built for CUDA {torch_cuda}"
        )
    else:
        return None
    if force_cuda:
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA sources cannot be built: {reason}")
    return reason


def parse_archs(text: str) -> list[str]:
    """Split a TORCH_CUDA_ARCH_LIST into its entries."""
    return [entry for entry in re.split(r"[;,\s]+", text) if entry]


def default_archs(visible: list[tuple[int, int]], known: list[str]) -> str:
    """Choose the GPU architectures to compile for.

    Args:
        visible: The compute capabilities of the GPUs of this machine.
        known: The architectures that PyTorch itself was compiled for, as "sm_90".
    """
    if not visible:
        return DEFAULT_ARCHS
    numbers = [int(match[1]) for name in known if (match := re.fullmatch(r"sm_(\d+)", name))]
    newest = divmod(max(numbers), 10) if numbers else max(visible)
    capped = sorted({min(capability, newest) for capability in visible})
    names = [f"{major}.{minor}" for major, minor in capped]
    return ";".join(names) + "+PTX"


def toolkit_archs(toolkit: Toolkit) -> list[str]:
    """List the architectures that a toolkit compiles for, as "compute_90"."""
    listed = command_output(str(toolkit.home / "bin" / "nvcc"), "--list-gpu-arch")
    return re.findall(r"^compute_\w+$", listed, re.MULTILINE)


def release_archs(toolkit: Toolkit, known: list[str]) -> str:
    """Choose the GPU architectures of a release.

    Args:
        toolkit: The CUDA toolkit, which a complaint names.
        known: The architectures that it compiles for, as "compute_90".
    """
    names = [arch for arch in RELEASE_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    if not names:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST=release: the CUDA toolkit {toolkit.version} in {toolkit.home} "
            f"compiles for none of {', '.join(RELEASE_ARCHS)}: install a newer one, or name the "
            'architectures, as "7.0+PTX"'
        )
    return ";".join(names) + "+PTX"


def default_jobs(cuda: bool) -> int:
    """Choose how many files are compiled at once, from the processors and the free memory."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return processors
    free = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    if not free:
        return processors
    per_job = 3 if cuda else 2  # GiB that a compiler takes at worst on PyTorch's headers
    return max(1, min(processors, int(free[1]) // (per_job << 20)))


def find_compiler() -> str:
    """Return the command of the C++ compiler."""
    command = os.environ.get("CXX")
    for name in [command] if command else ["c++", "g++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return name
    raise SystemExit(NO_COMPILER + (f" (CXX={command} is not there)" if command else ""))
