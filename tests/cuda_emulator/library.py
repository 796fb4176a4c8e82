# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loads the CUDA emulator: the CUDA kernels, compiled for the CPU (Makefile)."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Counts:
    """What the emulator has run so far."""

    launches: int
    threads: int
    shuffles: int
    atomics: int
    seed: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a kernel accessed in the checked build.

    The fields are (read, written, added atomically). `unique` counts each byte once per launch.
    """

    launches: int
    requested: tuple[int, int, int]
    unique: tuple[int, int, int]


class Emulator:
    """A loaded build. From then on the CUDA kernels serve the ops on CPU tensors."""

    def __init__(self, path: Path) -> None:
        import dcn_plugin.ops  # noqa: F401  (registers the ops whose kernels are replaced)

        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.dcn_emulator_peak.restype = ctypes.c_int64
        self._library.dcn_emulator_reset_peak.restype = ctypes.c_int64
        self.kernels = self._find_kernels(path)
        for name, address in self.kernels.items():
            self._library.dcn_emulator_name_kernel(ctypes.c_void_p(address), name.encode())

    def _find_kernels(self, path: Path) -> dict[str, int]:
        """Returns the addresses of the kernels, which the dynamic linker does not know."""
        listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True)
        symbols = re.findall(r"^([0-9a-f]+) [tTW] (.+)$", listed.stdout, re.MULTILINE)
        known = "dcn_emulator_peak"
        loaded = ctypes.cast(self._library[known], ctypes.c_void_p).value
        base = loaded - next(int(value, 16) for value, name in symbols if name == known)
        found = {}
        for value, symbol in symbols:
            if match := re.search(r"(\w+_kernel<[^>]*>)\(", symbol):
                found[match[1]] = base + int(value, 16)
        return found

    @property
    def is_checked(self) -> bool:
        """Whether memory accesses are checked."""
        return bool(self._library.dcn_emulator_is_checked())

    def counts(self) -> Counts:
        out = (ctypes.c_int64 * 5)()
        self._library.dcn_emulator_counts(out)
        return Counts(*out[:4], out[4] % 2**64)

    def traffic(self) -> dict[str, Traffic]:
        """Returns the traffic of the kernels that have run, by name."""
        found = {}
        for name, address in self.kernels.items():
            out = (ctypes.c_int64 * 7)()
            self._library.dcn_emulator_traffic(ctypes.c_void_p(address), out)
            if out[0]:
                found[name] = Traffic(out[0], tuple(out[1:4]), tuple(out[4:7]))
        return found

    def select_fault(self, name: str) -> None:
        """Selects a fault of the build `faults` (faults.py); "": none."""
        self._library.dcn_emulator_select_fault(name.encode())

    def reset_peak(self) -> int:
        """Restarts the measurement of peak memory; returns the bytes of all CPU tensors now."""
        return self._library.dcn_emulator_reset_peak()

    def peak(self) -> int:
        return self._library.dcn_emulator_peak()

    def run_few_warps(self, warps_at_each_place: int) -> None:
        """Runs only so many warps at the start, the middle and the end of grids; 0: all."""
        self._library.dcn_emulator_run_few_warps(ctypes.c_int64(warps_at_each_place))
