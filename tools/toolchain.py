# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Finds the compiler and the CUDA toolkit for setup.py. Needs the standard library only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Machine code for Ampere; the driver compiles the PTX for newer GPUs.
DEFAULT_ARCHS = "8.0+PTX"

# Flags of nvcc, beside those that PyTorch adds.
NVCC_FLAGS = ("-O3", "-DNDEBUG", "-Xcompiler", "-Wall,-Wextra")

# TORCH_CUDA_ARCH_LIST=release: one entry per GPU generation, and PTX of the newest for later ones.
RELEASE_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder and its version, such as "13.0"."""

    home: Path
    version: str


def flag(name: str) -> bool:
    """Returns whether an on/off environment variable is on."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "off", "no", "false")


def command_output(*command: str) -> str:
    """Returns what a command prints, or an empty string if it does not run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def cpp_standard(torch_version: str) -> str:
    """Returns the flag of the C++ standard that a version of PyTorch requires."""
    major, minor = (int(number) for number in torch_version.split(".")[:2])
    return "-std=c++20" if (major, minor) >= (2, 14) else "-std=c++17"


def named_toolkit() -> str | None:
    """Returns the folder that the user set for the CUDA toolkit."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_toolkit() -> Toolkit | None:
    """Returns the first toolkit whose nvcc runs and which has the header of the CUDA runtime."""
    if named := named_toolkit():
        candidates = [Path(named)]
    else:
        # The nvcc in PATH may be a wrapper script, which misleads PyTorch's own search; its dry run
        # prints the folder of the real one.
        dry_run = command_output("nvcc", "--dryrun", "-x", "cu", "-c", os.devnull)
        folders = re.findall(r"^#\$ _HERE_=(.+)$", dry_run, re.MULTILINE)
        candidates = [Path(folder.strip()).parent for folder in folders]
        candidates += [Path("/usr/local/cuda"), Path("/opt/cuda")]
        candidates += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for home in candidates:
        headers = [home / "include", *home.glob("targets/*/include")]
        printed = command_output(str(home / "bin" / "nvcc"), "--version")
        release = re.search(r"release (\d+\.\d+)", printed)
        if release and any((folder / "cuda_runtime.h").is_file() for folder in headers):
            return Toolkit(home, release[1])
    return None


def why_no_cuda(torch_cuda: str | None, toolkit: Toolkit | None, sanitize: str = "") -> str | None:
    """Decides whether the CUDA sources are compiled; FORCE_CPU and FORCE_CUDA override.

    Args:
        torch_cuda: The CUDA version of PyTorch, such as "13.0"; None for a build without CUDA.
        toolkit: The CUDA toolkit, if there is one.
        sanitize: The sanitizers to compile with.

    Returns:
        None if they are compiled, else the reason why not.
    """
    force_cuda = flag("FORCE_CUDA")
    if flag("FORCE_CPU"):
        if force_cuda:
            raise SystemExit("FORCE_CPU=1 and FORCE_CUDA=1 exclude each other: unset one of them")
        return "FORCE_CPU is set"
    if sanitize:
        reason = "DCN_SANITIZE compiles the C++ sources only"
    elif torch_cuda is None:
        reason = "PyTorch is built without CUDA"
    elif toolkit is None:
        named = named_toolkit()
        where = f"in CUDA_HOME={named}" if named else "(set CUDA_HOME to its folder)"
        reason = f"no CUDA toolkit was found {where}"
    elif toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        reason = (
            f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, "
            f"while PyTorch is built for CUDA {torch_cuda}"
        )
    else:
        return None
    if force_cuda:
        raise SystemExit(f"FORCE_CUDA=1, but the CUDA sources cannot be compiled: {reason}")
    return reason


def parse_archs(text: str) -> list[str]:
    """Splits a TORCH_CUDA_ARCH_LIST into its entries."""
    return [entry for entry in re.split(r"[;,\s]+", text) if entry]


def release_archs(toolkit: Toolkit) -> str:
    """Returns the architectures of a release build that the toolkit supports."""
    printed = command_output(str(toolkit.home / "bin" / "nvcc"), "--list-gpu-arch")
    supported = re.findall(r"^compute_(\w+)$", printed, re.MULTILINE)
    archs = [arch for arch in RELEASE_ARCHS if arch.replace(".", "") in supported]
    if not archs:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST=release: the CUDA toolkit {toolkit.version} in {toolkit.home} "
            f"supports none of {', '.join(RELEASE_ARCHS)}: install a newer one, or name the "
            'architectures, such as "7.0+PTX"'
        )
    return ";".join(archs) + "+PTX"


def find_compiler() -> str:
    """Returns the command of the C++ compiler: CXX, or PyTorch's default."""
    command = os.environ.get("CXX") or "c++"
    if not shutil.which(shlex.split(command)[0]):
        raise SystemExit(
            f"dcn_plugin needs a C++17 compiler, {command} was not found: install one (on Debian "
            "and Ubuntu `apt install g++`), or name it in CXX"
        )
    return command
