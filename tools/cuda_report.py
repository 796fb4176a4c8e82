#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reports registers, occupancy and memory accesses of the compiled CUDA kernels. Needs no GPU.

    python tools/cuda_report.py --archs sm_80 sm_90 sm_100 --summary --check

The machine code of an architecture is read from the library dcn_plugin/_C.abi3.so if it is in
there (after a change of the sources, `make setup` compiles it); otherwise the sources are compiled
with nvcc into build/cuda_report/, and compiled again only if they change. cuobjdump and nvdisasm
are taken from the CUDA toolkit or from the Triton package.

Local loads and stores are those of spilled registers and of a stack, in bytes, each instruction
counted once. Occupancy is the theoretical one with the block size of csrc/cuda/grid.cuh. Accesses
to global memory are instructions by width: "5x16 8x4" is five of 16 bytes and eight of 4.
Reductions include atomics. --summary prints ranges of registers and of occupancy, and the widest
loads/stores/reductions. --check fails for kernels with a stack or local accesses, and for variants
for vectors (last template argument above 1) without the 16-byte accesses of their source.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import toolchain

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
LIBRARY = ROOT / "dcn_plugin" / "_C.abi3.so"
BUILD = ROOT / "build" / "cuda_report"


class Limits(NamedTuple):
    """Limits of a multiprocessor; all have 65536 registers (CUDA C++ Programming Guide)."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90": Limits(64, 32, 228 << 10),
    "sm_100": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}
REGISTERS = 65536
RESERVED_SHARED = 1024  # per block, by the system

ACCESSES = {
    "loads": ("LDG", "LD"),
    "stores": ("STG", "ST"),
    "reductions": ("RED", "REDG", "ATOM", "ATOMG"),
    "local_loads": ("LDL",),
    "local_stores": ("STL",),
}
KIND = {opcode: kind for kind, opcodes in ACCESSES.items() for opcode in opcodes}

# 16-byte accesses in the source of the variants for vectors, at least: pixels, columns and pooled
# gradients are loaded, columns and outputs are stored. The kernels of grad_input for determinism
# store scalars. Reductions are per four float32 accumulators, where the GPU has vector atomics.
WIDE_ACCESSES = {
    "im2col_kernel": {"loads": 4, "stores": 2},
    "im2col_backward_kernel": {"loads": 5, "stores": 2, "reductions": 4},
    "sum_kernel": {"loads": 1},
    "pool_kernel": {"loads": 1, "stores": 1},
    "backward_kernel": {"loads": 2, "reductions": 1},
    "deterministic_kernel": {"loads": 1},
}


@dataclass
class Kernel:
    """One kernel on one architecture; accesses to global memory are counts by width in bytes."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    occupancy: float = 0.0
    local_loads: int = 0
    local_stores: int = 0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    reductions: Counter[int] = field(default_factory=Counter)

    @property
    def family(self) -> str:
        """The name without template arguments."""
        return self.name.split("<")[0]

    @property
    def vector_size(self) -> int:
        """Elements per access: the last template argument, 1 for kernels without it."""
        last = re.search(r", (\d+)>$", self.name)
        return int(last[1]) if last else 1


@functools.cache
def find_tool(name: str) -> str:
    """Returns the path of a binary utility of CUDA: the toolkit's, Triton's, or the one in PATH."""
    toolkit = toolchain.find_toolkit()
    folders = [toolkit.home / "bin"] if toolkit else []
    triton = importlib.util.find_spec("triton")
    for package in triton.submodule_search_locations or () if triton else ():
        folders.append(Path(package) / "backends" / "nvidia" / "bin")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    if not (found := shutil.which(name, path=path)):
        raise FileNotFoundError(
            f"{name} was not found in the CUDA toolkit, in the package triton and in PATH: "
            "install one of the first two, or set CUDA_HOME to the folder of the toolkit"
        )
    return found


def run(*command: str | Path, cwd: str | None = None, stdin: str | None = None) -> str:
    """Returns what a command prints; raises RuntimeError if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def embedded_archs() -> list[str]:
    """Returns the architectures whose machine code is in the library."""
    # cuobjdump fails if a library has no device code.
    listed = toolchain.command_output(find_tool("cuobjdump"), "--list-elf", str(LIBRARY))
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", listed)))


def nvcc_command(toolkit: toolchain.Toolkit, arch: str) -> list[str]:
    """Returns nvcc's command with the flags and include folders of setup.py."""
    os.environ["CUDA_HOME"] = str(toolkit.home)  # PyTorch reads it on import, as for setup.py
    import torch
    from torch.utils import cpp_extension

    folders = [*cpp_extension.include_paths(), toolkit.home / "include"]
    folders += Path(torch.__file__).parents[1].glob("nvidia/*/include")
    includes = [word for folder in folders for word in ("-isystem", str(folder))]
    standard = toolchain.cpp_standard(torch.__version__)
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, *toolchain.NVCC_FLAGS, standard]
    nvcc = str(toolkit.home / "bin" / "nvcc")
    return [nvcc, "-cubin", f"-arch={arch}", *flags, f"-I{CSRC}", *includes]


def compiled_cubins(arch: str) -> list[Path]:
    """Compiles the sources with kernels for an architecture, unless that was done before."""
    toolkit = toolchain.find_toolkit()
    if toolkit is None:
        raise FileNotFoundError(
            f"the library has no machine code for {arch}, and there is no CUDA toolkit to compile "
            "the sources: install one, set CUDA_HOME to its folder, or name other --archs"
        )
    command = nvcc_command(toolkit, arch)
    key = hashlib.sha256(f"{toolkit.version} {command}".encode())
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        key.update(f"{path.relative_to(CSRC)}\0".encode() + path.read_bytes())
    folder = BUILD / f"{arch}-{key.hexdigest()[:16]}"
    for old in BUILD.glob(f"{arch}-*"):
        if old != folder:
            shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in (CSRC / "cuda").rglob("*.cu") if "__global__" in path.read_text()]
    cubins = {folder / f"{path.parent.name}-{path.stem}.cubin": path for path in sorted(sources)}
    for cubin, source in cubins.items():
        if not cubin.is_file():
            print(f"compiling {source.relative_to(CSRC.parent)} for {arch}", file=sys.stderr)
            part = cubin.with_suffix(".part")
            run(*command, source, "-o", part)
            part.replace(cubin)
    return list(cubins)


def short_names(mangled: list[str]) -> list[str]:
    """Demangles names of kernels, without return type, namespaces and parameters."""
    demangler = shutil.which("c++filt") or shutil.which("cu++filt")
    if not demangler:
        raise FileNotFoundError("c++filt was not found: install binutils")
    lines = run(demangler, stdin="\n".join(mangled)).splitlines()
    plain = [re.sub(r"(\w+|[(<](anonymous namespace|unnamed)[)>])::", "", line) for line in lines]
    return [re.sub(r"\(int\)", "", line).removeprefix("void ").split("(")[0] for line in plain]


def resources(text: str) -> dict[str, dict[str, int]]:
    """Parses `cuobjdump --dump-resource-usage`: values by key and mangled name."""
    pattern = r"^ *Function (\S+):\s+(REG:.*)$"
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", values)}
        for name, values in re.findall(pattern, text, re.MULTILINE)
    }


def instructions(text: str) -> dict[str, Counter[str]]:
    """Parses the output of nvdisasm: how often each operation occurs, by mangled name."""
    counts: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        if label := re.match(r"\.text\.(\S+):", line):
            current = counts.setdefault(label[1], Counter())
        elif operation := re.match(r"\s+/\*[0-9a-f]+\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([\w.]+)", line):
            current[operation[1]] += 1
    return counts


def access_width(operation: str) -> int:
    """Returns the bytes of a memory access, such as 16 for LDG.E.128 and REDG.E.ADD.F32x4."""
    for suffix in reversed(operation.split(".")[1:]):
        if width := re.fullmatch(r"(?:F|BF|U|S)?(\d+)(?:(?:x|_V)(\d+))?(?:_RN)?", suffix):
            return int(width[1]) * int(width[2] or 1) // 8
    return 4


def add_accesses(kernel: Kernel, operations: Counter[str]) -> None:
    """Adds the accesses to global and local memory among the operations of a kernel."""
    for operation, count in operations.items():
        kind, width = KIND.get(operation.split(".")[0]), access_width(operation)
        if kind in ("local_loads", "local_stores"):
            setattr(kernel, kind, getattr(kernel, kind) + count * width)
        elif kind:
            getattr(kernel, kind)[width] += count


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float:
    """Returns the share of an SM's warps that are resident, limited by its resources."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256  # registers are allocated 256 at a time
    # Warps are divided among the four schedulers of an SM.
    by_registers = REGISTERS // 4 // per_warp * 4 // warps
    by_shared = limits.shared // (shared + RESERVED_SHARED)
    blocks = min(limits.warps // warps, limits.blocks, by_registers, by_shared)
    return blocks * warps / limits.warps


def block_size() -> int:
    """Returns the threads per block of all launches."""
    text = (CSRC / "cuda" / "grid.cuh").read_text()
    return int(re.search(r"\bkThreads = (\d+);", text)[1])


def read_kernels(cubins: list[Path], arch: str) -> Iterator[Kernel]:
    """Yields the kernels of cubins of one architecture."""
    threads = block_size()
    for cubin in cubins:
        usage = resources(run(find_tool("cuobjdump"), "--dump-resource-usage", cubin))
        if not usage:
            continue
        operations = instructions(run(find_tool("nvdisasm"), "-c", cubin))
        for (mangled, used), name in zip(usage.items(), short_names([*usage]), strict=True):
            registers, shared = used["REG"], used["SHARED"]
            kernel = Kernel(name, arch, registers, used["STACK"] + used["LOCAL"], shared)
            kernel.occupancy = occupancy(arch, registers, shared, threads)
            add_accesses(kernel, operations[mangled])
            yield kernel


def report(archs: list[str]) -> list[Kernel]:
    """Returns all kernels on all architectures, sorted by name."""
    kernels: list[Kernel] = []
    embedded = embedded_archs()
    for arch in archs:
        with tempfile.TemporaryDirectory() as folder:
            if arch in embedded:
                run(find_tool("cuobjdump"), "--extract-elf", f".{arch}.", LIBRARY, cwd=folder)
                cubins = sorted(Path(folder).glob("*.cubin"))
            else:
                cubins = compiled_cubins(arch)
            kernels += read_kernels(cubins, arch)
    return sorted(kernels, key=lambda kernel: (kernel.name, archs.index(kernel.arch)))


def faults(kernel: Kernel) -> list[str]:
    """Returns what --check rejects."""
    found = []
    if kernel.stack:
        found.append(f"has a stack of {kernel.stack} bytes")
    if kernel.local_loads or kernel.local_stores:
        found.append(f"loads {kernel.local_loads} and stores {kernel.local_stores} local bytes")
    if kernel.vector_size == 1:
        return found
    if kernel.family not in WIDE_ACCESSES and not kernel.loads[16] + kernel.stores[16]:
        found.append("has no 16-byte global loads or stores")
    for kind, least in WIDE_ACCESSES.get(kernel.family, {}).items():
        if kind == "reductions":
            vector_atomics = int(kernel.arch.removeprefix("sm_")) >= 90
            float4s = 0 if "<double" in kernel.name else kernel.vector_size // 4
            least *= float4s if vector_atomics else 0
        widths = getattr(kernel, kind)
        if widths[16] < least:
            found.append(f"has {widths[16]} instead of {least} 16-byte {kind}")
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    """Returns a share as text, such as 12.5%."""
    return f"{100 * share:.3g}%"


def kernel_table(kernels: list[Kernel]) -> str:
    """Returns a row per kernel and architecture."""
    header = ["kernel", "arch", "registers", "stack, B", "local loads / stores, B", "shared, B"]
    header += ["occupancy", "global loads", "global stores", "reductions"]

    def row(k: Kernel) -> list[str]:
        usage = [str(k.registers), str(k.stack), f"{k.local_loads} / {k.local_stores}"]
        accesses = [
            " ".join(f"{counts[width]}x{width}" for width in sorted(counts, reverse=True))
            for counts in (k.loads, k.stores, k.reductions)
        ]
        return [f"`{k.name}`", k.arch, *usage, str(k.shared), percent(k.occupancy), *accesses]

    return markdown(header, [row(kernel) for kernel in kernels])


def summary_table(kernels: list[Kernel]) -> str:
    """Returns a row per family of kernels and a column per architecture."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    families: dict[str, dict[str, list[Kernel]]] = {}
    for kernel in kernels:
        variant = f"{kernel.family}, {'vectors' if kernel.vector_size > 1 else 'scalars'}"
        families.setdefault(variant, {arch: [] for arch in archs})[kernel.arch].append(kernel)

    def span(values: list[str]) -> str:
        return values[0] if values[0] == values[-1] else f"{values[0]}-{values[-1]}"

    def cell(group: list[Kernel]) -> str:
        registers = span([str(count) for count in sorted(k.registers for k in group)])
        shares = span([percent(share) for share in sorted(k.occupancy for k in group)])
        widest = [
            str(max((width for k in group for width in getattr(k, kind)), default="-"))
            for kind in ("loads", "stores", "reductions")
        ]
        return f"{registers}; {shares}; {'/'.join(widest)}"

    rows = [[name, *(cell(by_arch[a]) for a in archs)] for name, by_arch in families.items()]
    return markdown(["kernel, variants", *archs], rows)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    archs = ["sm_80", "sm_90", "sm_100"]
    add("--archs", nargs="+", choices=LIMITS, default=archs, metavar="ARCH", help=", ".join(LIMITS))
    add("--summary", action="store_true", help="print a row per family of kernels only")
    add("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    add("--check", action="store_true", help="exit with 1 if a kernel has a fault")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Prints the report."""
    args = parse_arguments(words)
    try:
        kernels = report(args.archs)
        if args.json:
            args.json.write_text(json.dumps([vars(k) for k in kernels], indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        sys.exit(f"cuda_report: {error}")
    print(summary_table(kernels) if args.summary else kernel_table(kernels))
    found = [f"{k.name} on {k.arch} {fault}" for k in kernels for fault in faults(k)]
    if args.check and found:
        sys.exit("\n".join(f"cuda_report: {line}" for line in found))


if __name__ == "__main__":
    main()
