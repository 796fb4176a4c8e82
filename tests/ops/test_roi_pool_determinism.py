# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The same bits in every run, and on the CPU for any number of threads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.cuda_emulator.traffic import traffic_of
from tests.deterministic import deterministic_algorithms
from tests.devices import CUDA, EMULATOR
from tests.ops.roi_cases import MODES, RoiCase, gradients, standard_grad_output
from tests.ops.test_deform_conv2d_determinism import LAYOUTS, REPETITIONS, assert_same_bits


def spread_boxes(count, height, width):
    """Returns overlapping boxes of all sizes, on the image and across its borders."""
    boxes = []
    for k in range(count):
        x, y = width * (k * 0.618 % 1.2 - 0.1), height * (k * 0.414 % 1.2 - 0.1)
        size = 2 ** (2 + k * 0.732 % 1 * math.log2(width / 4))
        boxes.append((x - size / 2, y - size / 3, x + size / 2, y + size / 3))
    return tuple(boxes)


# As in Faster R-CNN: many channels, and RoIs for several threads.
DEEP = RoiCase(
    classes=1, channels=256, batch=2, size=(38, 50), output=(7, 7), scale=1 / 16,
    boxes=spread_boxes(60, 608, 800),
)  # fmt: skip
# Few channels and many RoIs.
MANY = RoiCase(
    classes=3, channels=3, batch=1, size=(60, 80), output=(7, 5), scale=1 / 8,
    boxes=spread_boxes(300, 480, 640),
)  # fmt: skip
# As in R-FCN: score maps per bin, offsets per class.
SCORES = RoiCase(
    classes=21, channels=21, batch=3, size=(38, 50), output=(7, 7), part=(7, 7), group=(7, 7),
    scale=1 / 16, boxes=spread_boxes(40, 608, 800),
)  # fmt: skip
# More RoIs than the CUDA kernels take at once: the budgets are used up by the bits of the cells of
# many classes and images, and by the offset gradients of many bins.
SEVERAL_RANGES = {
    "deterministic": RoiCase(
        classes=21, channels=21, batch=64, size=(8, 8), output=(7, 7), part=(7, 7), group=(1, 1),
        scale=1 / 16, boxes=spread_boxes(70, 128, 128),
    ),
    "atomic": RoiCase(
        classes=81, channels=81, batch=1, size=(4, 4), output=(7, 7), part=(1, 1), group=(1, 1),
        scale=1 / 16, ratio=1, boxes=spread_boxes(1060, 64, 64),
    ),
}  # fmt: skip
if EMULATOR:  # slow, and it draws the order of the warps, whatever their number
    DEEP = replace(DEEP, channels=12, boxes=spread_boxes(20, 608, 800))
    MANY = replace(MANY, boxes=spread_boxes(50, 480, 640))
    SCORES = replace(SCORES, classes=3, channels=3, boxes=spread_boxes(12, 608, 800))
CASES = {"deep": DEEP, "many": MANY, "scores": SCORES}
cases = pytest.mark.parametrize("name", CASES)


def draw(name, mode, device, dtype, layout):
    case = replace(CASES[name], mode=mode)
    call = case.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=LAYOUTS[layout])
    return case, call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@cases
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_for_any_number_of_threads(name, mode, dtype, layout):
    case, call = draw(name, mode, "cpu", dtype, layout)
    torch.set_num_threads(1)
    alone = gradients(case.function, call)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert_same_bits(gradients(case.function, call), alone)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@cases
def test_same_bits_with_deterministic_algorithms_on(name, mode, dtype, layout):
    case, call = draw(name, mode, CUDA, dtype, layout)
    with deterministic_algorithms():
        first = gradients(case.function, call)
        for _ in range(REPETITIONS):
            assert_same_bits(gradients(case.function, call), first)
    fast = gradients(case.function, call)
    assert torch.equal(fast[0], first[0])


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@cases
def test_only_grad_input_is_nondeterministic_on_cuda(name, layout):
    case, call = draw(name, "align", CUDA, torch.float32, layout)

    def without_input(run):
        return run[0], {k: v for k, v in run[1].items() if k != "input"}

    first = gradients(case.function, call)
    for _ in range(REPETITIONS):
        assert_same_bits(without_input(gradients(case.function, call)), without_input(first))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("deterministic", torch.float16),
        ("deterministic", torch.bfloat16),
        ("atomic", torch.float16),  # seconds
    ],
)
def test_sums_of_several_ranges_of_rois_are_rounded_once(name, dtype):
    case = SEVERAL_RANGES[name]
    call = case.draw(CUDA, dtype)
    in_float32 = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    grad_output = standard_grad_output(case.output_shape).to(CUDA, dtype)
    found = {}
    with deterministic_algorithms(name == "deterministic"):
        launched = launches(lambda: found.update(gradients(case.function, call, grad_output)[1]))
        wanted = gradients(case.function, in_float32, grad_output.float())[1]
    if EMULATOR:
        kernel = "cell_bits_kernel" if name == "deterministic" else "offset_grad_kernel"
        assert launched[kernel] > 1
    for gradient, expected in zip(found.values(), wanted.values(), strict=True):
        # The order of atomic additions changes the last bits of float32.
        atol = 1e-6 * float(expected.abs().max())
        rtol = 1.02 * torch.finfo(dtype).eps / 2
        assert_close(gradient.float(), expected, rtol=rtol, atol=atol)


def launches(call):
    """Calls a function; returns the number of launches by kernel, which the emulator counts."""
    if EMULATOR is None:
        return call()
    return {name.split("<")[0]: t.launches for name, t in traffic_of(EMULATOR, call).items()}
