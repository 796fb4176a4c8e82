# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Build of dcn_plugin and of its compiled ops, `dcn_plugin._C`.

Use it through pip, in an environment that already has PyTorch:

    pip install --no-build-isolation -e .

The C++ sources are always compiled; the CUDA sources when a CUDA toolkit and a CUDA build of
PyTorch of the same major version are there. Environment variables:

    FORCE_CPU=1           leave the CUDA sources out
    FORCE_CUDA=1          fail, rather than leave the CUDA sources out
    CUDA_HOME             the CUDA toolkit, where it is not found by itself
    TORCH_CUDA_ARCH_LIST  GPU architectures, as "8.0;9.0+PTX"; "release": all that a release is for,
                          7.5 to 12.0 as far as the toolkit goes, and PTX; default: those of the
                          GPUs of this machine, without one 8.0 and PTX
    MAX_JOBS              how many files are compiled at once
    DCN_SANITIZE          sanitizers for the C++ sources, as "address,undefined"; implies FORCE_CPU
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402  (needs the line above: pip runs this file from elsewhere)

SOURCES = ("csrc/library.cpp", "csrc/ops/*.cpp", "csrc/cpu/*.cpp")
CUDA_SOURCES = ("csrc/cuda/*.cu",)
HEADERS = ("csrc/**/*.h", "csrc/**/*.cuh")
BUILD_INFO = "_build_info.json"

NO_TORCH = (
    "dcn_plugin is compiled against your PyTorch: install PyTorch first, then run "
    "`pip install --no-build-isolation -e .` in the folder of dcn_plugin"
)


def files(*patterns: str) -> list[str]:
    """List the files that match, relative to the root, in a stable order."""
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def pip_cuda_folders(kind: str) -> list[Path]:
    """List the folders of CUDA headers ("include") or libraries ("lib") that pip installed.

    PyTorch's wheels bring the cuBLAS, cuSPARSE and other headers that a bare toolkit lacks, in
    one folder since CUDA 13 (nvidia/cu13), in one per library before (nvidia/cublas, …).
    """
    import torch

    nvidia = Path(torch.__file__).parent.parent / "nvidia"
    return sorted(path for path in nvidia.glob(f"*/{kind}") if path.is_dir())


def system_includes(folders: list[Path | str]) -> list[str]:
    """Return the flags for others' headers: -isystem keeps their warnings out of ours."""
    return [word for folder in folders for word in ("-isystem", str(folder))]


class Plan:
    """What is built: found out once, before the first file is compiled."""

    def __init__(self) -> None:
        """Look at PyTorch, the compiler and the CUDA toolkit; SystemExit where one is missing."""
        toolkit = toolchain.find_toolkit()
        if toolkit:
            # PyTorch reads it when cpp_extension is imported, and trusts the nvcc in PATH.
            os.environ["CUDA_HOME"] = str(toolkit.home)
        import torch

        self.toolkit = toolkit
        self.torch = torch.__version__
        self.sanitize = os.environ.get("DCN_SANITIZE", "").strip()
        self.reason = toolchain.why_no_cuda(
            torch.version.cuda,
            toolkit,
            force_cpu=toolchain.flag("FORCE_CPU"),
            force_cuda=toolchain.flag("FORCE_CUDA"),
            sanitize=self.sanitize,
        )
        self.cuda = self.reason is None
        self.archs: list[str] = []
        if self.cuda:
            chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or self._archs()
            if chosen == "release":
                chosen = toolchain.release_archs(toolkit, toolchain.toolkit_archs(toolkit))
            os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
            self.archs = toolchain.parse_archs(chosen)
        os.environ["CXX"] = self.compiler = toolchain.find_compiler()
        os.environ.setdefault("MAX_JOBS", str(toolchain.default_jobs(self.cuda)))
        # The ninja of an environment that is not activated is not in PATH.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]

    @staticmethod
    def _archs() -> str:
        import torch

        visible = [
            torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())
        ]
        return toolchain.default_archs(visible, torch.cuda.get_arch_list() if visible else [])

    @property
    def tag(self) -> str:
        """Name the folder of the objects: another configuration never meets these."""
        parts = [f"torch{self.torch}", f"cuda{self.toolkit.version}" if self.cuda else "cpu"]
        parts += [platform.machine(), self.sanitize]
        return re.sub(r"[^\w.+-]+", "-", "-".join(part for part in parts if part))

    def info(self, version: str) -> dict[str, Any]:
        """Return what `python -m dcn_plugin.env` prints of this build."""
        compiler = toolchain.command_output(*shlex.split(self.compiler), "--version")
        return {
            "version": version,
            "torch": self.torch,
            "compiler": (compiler.splitlines() or [self.compiler])[0],
            "cuda": self.toolkit.version if self.cuda else None,
            "no_cuda_reason": self.reason,
            "arch_list": self.archs,
            "sanitize": self.sanitize or None,
        }

    def extension(self) -> Extension:
        """Describe `dcn_plugin._C` to setuptools."""
        from torch.utils.cpp_extension import include_paths, library_paths

        common = system_includes(include_paths())
        if self.sanitize:
            tuning = [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-O1", "-g"]
            tuning += ["-fno-omit-frame-pointer", "-DDCN_SANITIZE"]
        else:
            tuning = ["-O3", "-g0", "-DNDEBUG"]
        openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is inline
        cxx = [*tuning, "-std=c++17", "-Wall", "-Wextra", *openmp, *common]
        link = [*openmp, *([f"-fsanitize={self.sanitize}"] if self.sanitize else [])]
        nvcc: list[str] = []
        libraries = ["c10", "torch_cpu", "torch"]
        if self.cuda:
            toolkit = self.toolkit.home
            cuda_includes = [toolkit / "include", *pip_cuda_folders("include")]
            nvcc = ["-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler", "-Wall,-Wextra"]
            nvcc += common + system_includes(cuda_includes)
            libraries += ["c10_cuda", "torch_cuda"]
            link.append(self._cudart())
        # BuildExtension itself adds -DPy_LIMITED_API; a free-threaded Python has no stable ABI.
        return Extension(
            "dcn_plugin._C",
            files(*SOURCES, *(CUDA_SOURCES if self.cuda else ())),
            include_dirs=[str(ROOT / "csrc")],
            depends=files(*HEADERS),
            libraries=libraries,
            library_dirs=library_paths(),
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
            extra_link_args=link,
            language="c++",
            py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
        )

    def _cudart(self) -> str:
        """Return the CUDA runtime library: the toolkit's, or the one that PyTorch brought."""
        home = self.toolkit.home
        folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        folders += pip_cuda_folders("lib")
        for folder in folders:
            for library in [folder / "libcudart.so", *sorted(folder.glob("libcudart.so.*"))]:
                if library.is_file():
                    return str(library)
        raise SystemExit(f"libcudart.so is neither in {home} nor beside PyTorch: set CUDA_HOME")


def build_command(plan: Plan) -> type:
    """Return the build_ext command that carries out a plan."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOps(BuildExtension):
        """PyTorch's build with a lasting folder of objects, and a record of what was built."""

        def run(self) -> None:
            """Compile what changed, link, and write the record last."""
            # An editable build gets a temporary folder by default, and so compiles all anew.
            self.build_temp = str(ROOT / "build" / plan.tag)
            package = (ROOT if self.inplace else Path(self.build_lib)) / "dcn_plugin"
            record = package / BUILD_INFO
            info = plan.info(self.distribution.get_version())
            if not record.is_file() or json.loads(record.read_text()) != info:
                self.force = True  # without ninja; with it, every build links anew
            # No record, no finished library: so an interrupted build shows.
            record.unlink(missing_ok=True)
            print(f"dcn_plugin: {describe(info)}", flush=True)
            super().run()
            package.mkdir(parents=True, exist_ok=True)
            unfinished = record.with_suffix(".tmp")
            unfinished.write_text(json.dumps(info, indent=2) + "\n")
            unfinished.replace(record)

    return BuildOps


def describe(info: dict[str, Any]) -> str:
    """Return one line on what is about to be built."""
    if info["cuda"]:
        what = f"C++ and CUDA {info['cuda']} for {' '.join(info['arch_list'])}"
    else:
        what = f"C++ only ({info['no_cuda_reason']})"
    return f"{what}, PyTorch {info['torch']}, {info['compiler']}"


def main() -> None:
    """Build the project, or say in one line what is missing."""
    try:
        plan = Plan()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit(NO_TORCH) from None
    setup(
        license="Apache-2.0",
        ext_modules=[plan.extension()],
        cmdclass={"build_ext": build_command(plan)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
