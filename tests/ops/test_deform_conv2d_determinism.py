# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The same bits in every run, and on the CPU for any number of threads."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from dcn_plugin._library import build_info
from dcn_plugin.ops import deform_conv2d
from tests.deterministic import deterministic_algorithms
from tests.devices import CUDA, EMULATOR
from tests.ops.conv_cases import ConvCase, gradients

# Four slices of channels, and work for several threads.
DEEP = ConvCase(
    in_channels=256, out_channels=64, size=(48, 48), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), groups=1, offset_groups=2,
)  # fmt: skip
if EMULATOR:  # slow, and it draws the order of the warps, whatever their number
    DEEP = dataclasses.replace(DEEP, size=(12, 12))
REPETITIONS = 1 if EMULATOR else 3
# One slice, and several tiles of output positions that add to the same pixels.
LARGE = ConvCase(
    batch=1, in_channels=3, out_channels=2, size=(230, 310), kernel=(3, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1, offset_groups=1,
)  # fmt: skip
# As many slices as groups, and many images.
GROUPED = ConvCase(batch=9, in_channels=24, out_channels=12, size=(31, 29), groups=4)
# Two slices whose channels are no multiple of a vector, for several threads each.
WIDE = ConvCase(
    batch=1, in_channels=37, out_channels=70, size=(40, 45), kernel=(3, 3), stride=(1, 1),
    padding=(1, 1), dilation=(1, 1), groups=1, offset_groups=1,
)  # fmt: skip
# Its output is written by another GEMM.
EXPANDING = ConvCase(
    batch=1, in_channels=24, out_channels=80, size=(41, 37), kernel=(1, 1), stride=(1, 1),
    padding=(0, 0), dilation=(1, 1), groups=1, offset_groups=1,
)  # fmt: skip
# Without brgemm, BLAS multiplies, whose bits may depend on the number of threads.
HAS_BRGEMM = (
    not build_info()["portable"]
    and "CPUBLAS_BRGEMM_F32F32F32"
    in (Path(torch.__file__).parent / "include/ATen/native/CPUBlas.h").read_text()
)  # not in PyTorch 2.6
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def draw(case, device, dtype, layout):
    call = case.draw(device, dtype)
    call["offset"] *= 5  # taps of distant tiles read the same pixels
    call["input"] = call["input"].contiguous(memory_format=LAYOUTS[layout])
    return call


def assert_same_bits(first, second):
    (output, found), (other_output, other_found) = first, second
    for name, tensor in {"output": output, **found}.items():
        other = other_output if name == "output" else other_found[name]
        # Compares bits, so that -0 differs from 0.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(tensor.view(bits), other.view(bits)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [DEEP, LARGE, GROUPED, WIDE, EXPANDING],
    ids=["deep", "large", "grouped", "wide", "expanding"],
)
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_for_any_number_of_threads(case, dtype, layout):
    call = draw(case, "cpu", dtype, layout)
    torch.set_num_threads(1)
    alone = gradients(deform_conv2d, call)
    for threads in (2, 4, 3, 16) if HAS_BRGEMM else (2, 4, 3):
        torch.set_num_threads(threads)
        assert_same_bits(gradients(deform_conv2d, call), alone)


def test_the_library_uses_threads():
    """Without OpenMP, at::parallel_for silently uses one thread, and the test above is void."""
    library = Path(importlib.util.find_spec("dcn_plugin._C").origin).read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [DEEP, LARGE, GROUPED], ids=["deep", "large", "grouped"])
def test_same_bits_with_deterministic_algorithms_on(case, dtype, layout):
    call = draw(case, CUDA, dtype, layout)
    with deterministic_algorithms():
        first = gradients(deform_conv2d, call)
        for _ in range(REPETITIONS):
            assert_same_bits(gradients(deform_conv2d, call), first)
    fast = gradients(deform_conv2d, call)
    assert torch.equal(fast[0], first[0])


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_grad_input_is_nondeterministic_on_cuda(layout):
    call = draw(DEEP, CUDA, torch.float32, layout)

    def without_input(run):
        return run[0], {k: v for k, v in run[1].items() if k != "input"}

    first = gradients(deform_conv2d, call)
    for _ in range(REPETITIONS):
        assert_same_bits(without_input(gradients(deform_conv2d, call)), without_input(first))
