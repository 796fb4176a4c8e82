# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Builds dcn_plugin and its compiled ops, `dcn_plugin._C`.

Run it through pip, in an environment that has PyTorch:

    pip install --no-build-isolation -e .

The C++ sources are always compiled; the CUDA sources if there is a CUDA toolkit of the same major
version as PyTorch's. Environment variables:

    FORCE_CPU=1           do not compile the CUDA sources
    FORCE_CUDA=1          fail instead of leaving the CUDA sources out
    CUDA_HOME             path of the CUDA toolkit, if it is not found automatically
    TORCH_CUDA_ARCH_LIST  GPU architectures, such as "8.0;9.0+PTX", or "release" for 7.5 to 12.0 (as
                          far as the toolkit supports them) and PTX; default: the GPUs of this
                          machine, or 8.0 and PTX if it has none
    MAX_JOBS              number of parallel compiler processes
    DCN_SANITIZE          sanitizers for the C++ sources, such as "address,undefined"; no CUDA
    DCN_PORTABLE=1        leave out what is for x86-64 only, as on other processors, for tests

`python -m build --wheel --no-isolation` builds a wheel with the same variables: docs/install.md.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402  (pip runs this file from another folder)

toolkit = toolchain.find_toolkit()
if toolkit:  # PyTorch reads the variable when cpp_extension is imported
    os.environ["CUDA_HOME"] = str(toolkit.home)
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "dcn_plugin is compiled against your PyTorch: install PyTorch first, then run "
        "`pip install --no-build-isolation -e .` in the folder of dcn_plugin"
    ) from None

SANITIZE = os.environ.get("DCN_SANITIZE", "").strip()
PORTABLE = toolchain.flag("DCN_PORTABLE")
NO_CUDA_REASON = toolchain.why_no_cuda(torch.version.cuda, toolkit, sanitize=SANITIZE)
CUDA = NO_CUDA_REASON is None
# Where the files of a wheel are collected.
BUILD_LIB = ROOT / "build" / "lib"


def files(*patterns: str) -> list[str]:
    """Lists the files of csrc/ that match, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(f"csrc/{p}"))


def configure() -> None:
    """Sets the variables that PyTorch's build reads: compiler, architectures and parallel jobs."""
    os.environ["CXX"] = toolchain.find_compiler()
    # ninja is not in PATH if the environment is not activated.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if CUDA and archs == "release":
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolchain.release_archs(toolkit)
    elif CUDA and not archs and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolchain.DEFAULT_ARCHS


def torch_requirement() -> str:
    """Returns the PyTorch that the metadata requires.

    Compiled ops, in a wheel or an editable install, work with the minor version that they were
    compiled for only. A source distribution can be compiled for any that is supported.
    """
    if {"bdist_wheel", "dist_info", "editable_wheel"}.isdisjoint(sys.argv):
        return "torch>=2.6"
    major, minor = torch.__version__.split(".")[:2]
    return f"torch=={major}.{minor}.*"  # local versions and nightly builds match as well


def arch_list() -> list[str]:
    """Returns the GPU architectures, for the record."""
    if not CUDA:
        return []
    named = toolchain.parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return named or [f"{major}.{minor}" for major, minor in sorted(gpus)]


def extension() -> Any:
    """Describes `dcn_plugin._C` to setuptools."""
    # -isystem overrides the -I that PyTorch adds: no warnings from headers that are not ours.
    headers = [Path(path) for path in include_paths()]
    cuda_headers = [*headers, *Path(torch.__file__).parents[1].glob("nvidia/*/include")]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is inline
    # PyTorch's checks contain the paths of sources and headers; those of this machine help nobody.
    folders = [ROOT, Path(torch.__file__).parents[1]]
    relative_paths = [f"-ffile-prefix-map={folder}/=" for folder in folders]
    if SANITIZE:
        flags = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-O1", "-g"]
        flags += ["-fno-omit-frame-pointer", "-DDCN_SANITIZE", "-D_GLIBCXX_ASSERTIONS"]
    else:
        flags = ["-O3", "-g0", "-DNDEBUG", *relative_paths]
    # Floating-point exceptions are not read; otherwise GCC does not vectorize conditions on floats.
    # Vectors are passed between inlined functions only, so their ABI does not matter.
    flags += ["-fno-trapping-math", "-Wno-psabi", *(["-DDCN_PORTABLE"] if PORTABLE else [])]
    make_extension = CUDAExtension if CUDA else CppExtension
    return make_extension(
        "dcn_plugin._C",
        files("library.cpp", "ops/*.cpp", "cpu/**/*.cpp", *(["cuda/**/*.cu"] if CUDA else [])),
        include_dirs=[str(ROOT / "csrc")],
        depends=files("**/*.h", "**/*.cuh"),
        extra_compile_args={
            "cxx": [*flags, "-Wall", "-Wextra", *openmp, *system(headers)],
            "nvcc": [
                *toolchain.NVCC_FLAGS,
                *(f"-Xcompiler={flag}" for flag in relative_paths),
                *system(cuda_headers),
            ],
        },
        extra_link_args=[*openmp, *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])],
        py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
    )


def system(folders: list[Path]) -> list[str]:
    """Returns the compiler flags for system headers."""
    return [word for folder in folders for word in ("-isystem", str(folder))]


class BuildOps(BuildExtension):
    """Adds to PyTorch's build a lasting build folder, and a record for `python -m dcn_plugin.env`.

    An editable install would otherwise build in a temporary folder and recompile everything.
    """

    def run(self) -> None:
        """Compiles what changed; writes the record last, so that it marks a finished build."""
        cuda = toolkit.version if CUDA else None
        self.force = True  # setuptools compares times only; ninja compares the flags as well
        # ninja does not track PyTorch's headers, so each version has a folder of its own.
        folder = f"torch{torch.__version__}-{f'cuda{cuda}' if cuda else 'cpu'}"
        self.build_temp = str(ROOT / "build" / folder)
        package = (ROOT if self.inplace else Path(self.build_lib)) / "dcn_plugin"
        compiler = toolchain.command_output(*shlex.split(os.environ["CXX"]), "--version")
        info = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "compiler": (compiler.splitlines() or [os.environ["CXX"]])[0],
            "cuda": cuda,
            "no_cuda_reason": NO_CUDA_REASON,
            "arch_list": arch_list(),
            "sanitize": SANITIZE or None,
            "portable": PORTABLE,
            "wheel": not self.inplace,
        }
        print(f"dcn_plugin: {json.dumps(info)}", flush=True)
        record = package / "_build_info.json"
        record.unlink(missing_ok=True)
        super().run()
        package.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(info, indent=2) + "\n")


configure()
if "bdist_wheel" in sys.argv:  # setuptools would pack what was deleted since the last wheel
    shutil.rmtree(BUILD_LIB, ignore_errors=True)
setup(
    license="Apache-2.0",
    install_requires=[torch_requirement()],
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildOps},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "build": {"build_lib": str(BUILD_LIB)},
    },
)
