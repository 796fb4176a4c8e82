# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The static report of the CUDA kernels: what the tools print, occupancy, and the real library."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import cuda_report
import pytest
from cuda_report import Kernel

# Recorded with nvdisasm and cuobjdump 12.8 from csrc/cuda/conv/deform_im2col.cu, compiled by nvcc
# 13.0 for sm_90, and trimmed; SPILLED is the same file compiled with -maxrregcount=40.
PREFIX = "_ZN3dcn4cuda55_GLOBAL__N__a0df9102_16_deform_im2col_cu_d13ce696_15219"
BACKWARD = f"{PREFIX}22im2col_backward_kernelIffLi4EEEvNS1_14BackwardParamsIT_T0_EE"
FORWARD = f"{PREFIX}13im2col_kernelIN3c104HalfEfLi8EEEvNS0_10Im2colTileIT_T0_EE"
SPILLED = f"{PREFIX}22im2col_backward_kernelIN3c108BFloat16EfLi1EEEvNS1_14BackwardParamsIT_T0_EE"

USAGE = f"""
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function {BACKWARD}:
  REG:91 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:944 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {SPILLED}:
  REG:40 STACK:152 SHARED:0 LOCAL:0 CONSTANT[0]:944 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = f"""
\t.target\tsm_90

\t.elftype\t@"ET_EXEC"

//--------------------- .text.{BACKWARD} --------------------------
\t.section\t.text.{BACKWARD},"ax",@progbits
\t.align\t128
.text.{BACKWARD}:
        .type           {BACKWARD},@function
{BACKWARD}:
        /*0310*/              @!P2 IMAD.MOV R2, RZ, RZ, -R2 ;
        /*0f80*/              @!P2 LDG.E.U16 R30, desc[UR18][R30.64] ;
        /*0fc0*/               @P2 LDG.E R22, desc[UR18][R28.64] ;
.L_x_61:
        /*1000*/                   LDG.E.64 R22, desc[UR18][R28.64] ;
        /*2580*/                   LDG.E.128 R24, desc[UR18][R24.64] ;
        /*2590*/                   LDG.E.128 R20, desc[UR18][R80.64] ;
        /*26a0*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR18][R34.64], R28 ;
        /*2c70*/               @P1 STG.E.128 desc[UR18][R80.64], R24 ;
        /*3700*/              @!P3 STG.E.U16 desc[UR18][R24.64], R14 ;
$__internal_0_$__cuda_sm20_div_s64:
        /*28a0*/                   ISETP.GE.AND P3, PT, R26, RZ, PT ;

.text.{SPILLED}:
        /*0320*/                   STL [R1+0x48], R6 ;
        /*06c0*/                   LDL.LU R12, [R1+0x48] ;
        /*2260*/                   STL.64 [R1+0x18], R22 ;
"""


def test_resource_usage_is_read_by_kernel() -> None:
    usage = cuda_report.resources(USAGE)
    assert [*usage] == [BACKWARD, SPILLED]
    assert usage[BACKWARD]["REG"] == 91 and usage[BACKWARD]["STACK"] == 0
    assert usage[SPILLED]["REG"] == 40 and usage[SPILLED]["STACK"] == 152


def test_accesses_are_counted_by_width() -> None:
    operations = cuda_report.instructions(SASS)
    assert [*operations] == [BACKWARD, SPILLED]
    assert operations[BACKWARD]["IMAD.MOV"] == operations[BACKWARD]["ISETP.GE.AND"] == 1
    kernel = Kernel("im2col_backward_kernel<float, float, 4>", "sm_90")
    cuda_report.add_accesses(kernel, operations[BACKWARD])
    assert kernel.loads == {16: 2, 8: 1, 4: 1, 2: 1}
    assert kernel.stores == {16: 1, 2: 1}
    assert kernel.reductions == {16: 1}
    assert kernel.local_loads == kernel.local_stores == 0


def test_spills_are_counted_in_bytes() -> None:
    kernel = Kernel("im2col_backward_kernel<BFloat16, float, 1>", "sm_90")
    cuda_report.add_accesses(kernel, cuda_report.instructions(SASS)[SPILLED])
    assert (kernel.local_loads, kernel.local_stores) == (4, 4 + 8)
    assert not kernel.loads and not kernel.stores


@pytest.mark.parametrize(
    ("operation", "width"),
    [
        ("LDG.E", 4),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.U8", 1),
        ("LDG.E.LTC128B.64", 8),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", 4),
        ("RED.E.ADD.F64.RN.STRONG.GPU", 8),
        ("RED.E.ADD.F16x2.RN.STRONG.GPU", 4),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", 16),
        ("ATOMG.E.ADD.64.STRONG.GPU", 8),
    ],
)
def test_the_width_is_in_the_name_of_the_operation(operation: str, width: int) -> None:
    assert cuda_report.access_width(operation) == width


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_names_are_short() -> None:
    names = cuda_report.short_names([BACKWARD, FORWARD])
    assert names == ["im2col_backward_kernel<float, float, 4>", "im2col_kernel<Half, float, 8>"]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "blocks", "of"),
    [
        ("sm_80", 32, 0, 8, 8),  # all 64 warps
        ("sm_90", 33, 0, 6, 8),  # 33 * 32 -> 1280 per warp, 12 warps per scheduler, 48 in all
        ("sm_80", 64, 0, 4, 8),  # 2048 per warp, 8 warps per scheduler
        ("sm_90", 96, 0, 2, 8),  # 3072 per warp, 5 warps per scheduler: two of 20 / 8 blocks
        ("sm_100", 128, 0, 2, 8),  # 4096 per warp, 4 warps per scheduler
        ("sm_100", 129, 0, 1, 8),  # 4352 per warp, 3 warps per scheduler
        ("sm_86", 40, 0, 6, 6),  # all 48 warps
        ("sm_80", 32, 48 << 10, 3, 8),  # 49 KiB of 164 per block
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, blocks: int, of: int) -> None:
    assert cuda_report.occupancy(arch, registers, shared, threads=256) == blocks / of


def test_the_block_size_is_that_of_the_launches() -> None:
    assert cuda_report.block_size() == 256


def wide(name: str, arch: str, **counts: int) -> Kernel:
    """A kernel with 16-byte accesses only."""
    return Kernel(name, arch, **{kind: Counter({16: n}) for kind, n in counts.items()})


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (Kernel("im2col_kernel<float, float, 1>", "sm_80"), []),
        (Kernel("key_kernel<float, float>", "sm_80", stack=8), ["has a stack of 8 bytes"]),
        (
            Kernel("key_kernel<float, float>", "sm_80", local_loads=4, local_stores=12),
            ["loads 4 and stores 12 local bytes"],
        ),
        (wide("im2col_kernel<float, float, 4>", "sm_80", loads=4, stores=2), []),
        (
            wide("im2col_kernel<float, float, 4>", "sm_80", loads=4, stores=1),
            ["has 1 instead of 2 16-byte stores"],
        ),
        (wide("backward_kernel<float, float, 4>", "sm_80", loads=2), []),
        (
            wide("backward_kernel<Half, float, 8>", "sm_90", loads=2, reductions=1),
            ["has 1 instead of 2 16-byte reductions"],
        ),
        (wide("backward_kernel<double, double, 2>", "sm_90", loads=2), []),
        (wide("new_kernel<float, float, 4>", "sm_80", stores=1), []),
        (
            Kernel("new_kernel<float, float, 4>", "sm_80", loads=Counter({4: 9})),
            ["has no 16-byte global loads or stores"],
        ),
    ],
)
def test_faults(kernel: Kernel, found: list[str]) -> None:
    assert cuda_report.faults(kernel) == found


def test_main_prints_tables_writes_json_and_fails_with_faults(
    monkeypatch, tmp_path, capsys
) -> None:
    kernel = Kernel("key_kernel<float, float>", "sm_80", 34, stack=8, occupancy=0.625)
    kernel.loads.update({8: 3, 4: 2})
    monkeypatch.setattr(cuda_report, "report", lambda archs: [kernel])
    cuda_report.main(["--json", str(tmp_path / "report.json")])
    row = "| `key_kernel<float, float>` | sm_80 | 34 | 8 | 0 / 0 | 0 | 62.5% | 3x8 2x4 |  |  |"
    assert capsys.readouterr().out.splitlines()[2] == row
    (written,) = json.loads((tmp_path / "report.json").read_text())
    assert written["registers"] == 34 and written["loads"] == {"8": 3, "4": 2}
    with pytest.raises(SystemExit, match=r"key_kernel<float, float> on sm_80 has a stack of 8"):
        cuda_report.main(["--summary", "--check"])
    row = "| key_kernel, scalars | 34; 62.5%; 8/-/- |"
    assert capsys.readouterr().out.splitlines()[2] == row


def test_sources_are_compiled_once(monkeypatch, tmp_path: Path) -> None:
    compiled = []

    def run(*command: str | Path) -> None:
        compiled.append(command[-3].name)
        command[-1].write_text("")

    monkeypatch.setattr(cuda_report, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(cuda_report, "BUILD", tmp_path / "build")
    toolkit = cuda_report.toolchain.Toolkit(Path("cuda"), "13.0")
    monkeypatch.setattr(cuda_report.toolchain, "find_toolkit", lambda: toolkit)
    monkeypatch.setattr(cuda_report, "nvcc_command", lambda toolkit, arch: ["nvcc", arch])
    monkeypatch.setattr(cuda_report, "run", run)
    folder = tmp_path / "csrc" / "cuda" / "conv"
    folder.mkdir(parents=True)
    (folder / "kernel.cu").write_text("__global__ void kernel() {}")
    (folder / "host.cu").write_text("void host() {}")
    first = cuda_report.compiled_cubins("sm_90")
    assert cuda_report.compiled_cubins("sm_90") == first and compiled == ["kernel.cu"]
    (folder / "header.cuh").write_text("#pragma once")
    second = cuda_report.compiled_cubins("sm_90")
    assert second != first and compiled == ["kernel.cu"] * 2
    assert not first[0].exists() and second[0].exists()


def test_a_missing_tool_is_named(monkeypatch) -> None:
    monkeypatch.setattr(cuda_report.toolchain, "find_toolkit", lambda: None)
    monkeypatch.setattr(cuda_report.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"nvdisasm was not found .* set CUDA_HOME"):
        cuda_report.find_tool.__wrapped__("nvdisasm")


def test_the_library_has_no_spills_no_stack_and_16_byte_accesses() -> None:
    """On the architectures that were compiled: sm_80 in CI."""
    try:
        archs = [arch for arch in cuda_report.embedded_archs() if arch in cuda_report.LIMITS]
        if not archs:
            pytest.skip("the ops were built without CUDA, or for other architectures")
        kernels = cuda_report.report(archs)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    found = [f"{k.name} on {k.arch} {fault}" for k in kernels for fault in cuda_report.faults(k)]
    assert not found, "\n".join(found)
    wide_kernels = {kernel.family for kernel in kernels if kernel.vector_size > 1}
    assert wide_kernels == set(cuda_report.WIDE_ACCESSES)
    assert all(0 < kernel.registers < 255 and kernel.occupancy > 0 for kernel in kernels)
