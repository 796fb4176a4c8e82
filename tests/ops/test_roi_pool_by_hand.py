# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Values that can be checked by hand: bins, samples, and gradients at the border."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.ops import deform_roi_pool
from tests.ops.roi_cases import ASYMMETRIC, MODES


def pool(boxes, mode, output_size=1, offset=None, device="cpu", **options):
    """Pools the 5x5 map 0, 1, 2, ... 24."""
    input = torch.arange(25.0, device=device).reshape(1, 1, 5, 5)
    rois = torch.tensor([(0.0, *box) for box in boxes], device=device)
    if offset is not None:
        offset = torch.tensor(offset, device=device).reshape(len(boxes), 2, 1, 1)
    return deform_roi_pool(input, rois, offset, output_size, mode=mode, **options)


def test_bin_on_half_pixel_corners_by_hand(device):
    # 0.5 rounds to 1 and 3.5 to 4: pixels 1, 2, 3 of each axis. Of two bins along an axis the
    # first has floor(0 * 3 / 2) .. ceil(3 / 2), pixels 1 and 2, the second pixels 2 and 3.
    box = [(0.5, 0.5, 3.5, 3.5)]
    assert pool(box, "bin", device=device).item() == 12
    assert pool(box, "bin", 2, device=device).flatten().tolist() == [9, 10, 14, 15]
    # -1.5 rounds to -1, -0.5 to 0, 1.5 to 2, 2.5 to 3: columns -1, 0, 1 and rows 0, 1, 2;
    # three of the nine pixels are outside and count as zero.
    over = [(-1.5, -0.5, 1.5, 2.5)]
    assert pool(over, "bin", device=device).item() == pytest.approx(33 / 9)
    # An empty box is the pixel at its corner.
    empty = [(2.5, 0.5, 2.5, 0.5), (2.5, 0.5, -7.0, -9.0)]
    assert pool(empty, "bin", device=device).flatten().tolist() == [8, 8]


def test_bin_with_offsets_by_hand(device):
    # Two pixels wide and high: 0.5 of that times 0.5 is half a pixel to the right.
    boxes = [(0.5, 0.5, 2.5, 2.5), (2.5, 2.5, 4.5, 4.5), (-1.5, 0.5, 0.5, 2.5)]
    offset = [(0.5, 0.0)] * 3
    # 6 7 8    18 19 0    0 5 6  averaged over each two columns and then all.
    # 11 12 13 23 24 0    0 10 11
    expected = [9.5, (18.5 + 9.5 + 23.5 + 12) / 4, (2.5 + 5.5 + 5 + 10.5) / 4]
    output = pool(boxes, "bin", offset=offset, gamma=0.5, device=device)
    assert output.flatten().tolist() == expected
    # Channels are x, then y: half a pixel down, from rows 3 and 4, is (20.5 + 11.5) / 2.
    down = pool([(2.5, 2.5, 3.5, 4.5)], "bin", offset=[(0.0, 0.5)], gamma=0.5, device=device)
    assert down.item() == 0.5 * ((18 + 23) / 2 + 23 / 2)


def test_bin_ignores_the_sampling_ratio(device):
    case = ASYMMETRIC["bin"]
    call = case.draw(device)
    output = case.function(**call)
    assert torch.equal(case.function(**{**call, "sampling_ratio": 5}), output)


def test_msra_by_hand(device):
    # From -0.5, 4 wide: samples at -0.5, 0.5, 1.5, 2.5, of which the first is clamped to 0.
    box = [(0.0, 0.0, 3.0, 3.0)]
    assert pool(box, "msra", device=device).item() == 6 * 4.5 / 4
    two = pool(box, "msra", 2, sampling_ratio=2, device=device)
    assert two.flatten().tolist() == [1.5, 3.25, 10.25, 12]
    # Columns -3.5, -2.5, -1.5 are skipped and not counted, -0.5 is clamped to 0.
    over = [(-3.0, 0.0, 0.0, 3.0)]
    assert pool(over, "msra", device=device).item() == 5 * 4.5 / 4
    # 0.5 rounds to 1, -0.5 to -1, 2.5 to 3: as the box (1, -1, 3, 0).
    halves = [(0.5, -0.5, 2.5, 0.4), (1.0, -1.0, 3.0, 0.0)]
    first, second = pool(halves, "msra", 2, device=device)
    assert torch.equal(first, second)
    # An inverted box is 0.1 wide.
    inverted = pool([(2.0, 2.0, 0.0, 0.0)], "msra", sampling_ratio=2, device=device)
    assert inverted.item() == pytest.approx(6 * 1.525)


def gradient_of_one_sample(mode, x, y, device, dtype):
    """Returns the gradient of (dx, dy) for one sample at (x, y) of the map 10, 20; 30, 40."""
    input = torch.tensor([[10.0, 20.0], [30.0, 40.0]], device=device, dtype=dtype)
    box = torch.tensor([[0.0, 0, 0, 0, 0] if mode == "msra" else [0.0, 0, 0, 1, 1]])
    from_start = 0.5 if mode == "msra" else 0.0
    offset = torch.tensor([x + from_start, y + from_start], dtype=dtype).reshape(1, 2, 1, 1)
    offset = offset.to(device).requires_grad_()
    box = box.to(device, dtype)
    output = deform_roi_pool(input[None, None], box, offset, 1, 1.0, 1, 1.0, mode)
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    return gradient.flatten().tolist()


# At y = 0.5 the map is 20, 30.
ALONG_X = {
    "align": {
        -1.5: (0, 0), -1.0: (0, 20), -0.5: (0, 20), 0.0: (10, 20), 0.5: (10, 20), 1.0: (0, 20),
        1.5: (0, 20), 2.0: (0, 20), 2.5: (0, 0),
    },
    "bin": {
        -1.5: (0, 0), -0.5: (20, 10), 0.0: (10, 20), 0.5: (10, 20), 1.0: (-30, 20),
        1.5: (-30, 10), 2.0: (0, 0), 2.5: (0, 0),
    },
    "msra": {
        -0.75: (0, 0), -0.5: (0, 20), -0.25: (0, 20), 0.0: (0, 20), 0.5: (10, 20), 1.0: (0, 20),
        1.25: (0, 20), 1.5: (0, 20), 1.75: (0, 0),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("mode, x", [(mode, x) for mode in MODES for x in ALONG_X[mode]])
def test_offset_gradient_of_one_sample(mode, x, dtype, device):
    d_x, d_y = ALONG_X[mode][x]
    assert gradient_of_one_sample(mode, x, 0.5, device, dtype) == [d_x, d_y]
    # Transposed, the map is 10, 30; 20, 40: at x = 0.5 it is 15, 35.
    swapped = gradient_of_one_sample(mode, 0.5, x, device, dtype)
    along_y = {20: 15, 30: 35, 10: 20}  # value of a column: step between columns
    assert swapped[1] == (along_y.get(abs(d_x), 0) * (-1 if d_x < 0 else 1))
    assert swapped[0] == d_y / 2


def test_bin_offset_gradient_from_the_right_at_minus_one(device):
    """To the right of -1 the first pixel fades in: 20 per pixel."""
    assert gradient_of_one_sample("bin", -1.0, 0.5, device, torch.float64) == [20, 0]
    assert gradient_of_one_sample("bin", 0.5, -1.0, device, torch.float64) == [0, 15]
    assert gradient_of_one_sample("bin", -1.0, -1.0, device, torch.float64) == [0, 0]


def test_bin_offset_gradient_at_zero_over_the_border_by_hand(device):
    # Pixels 18, 19; 23, 24 in the lower right corner. Towards the right 18 changes by 1, 19 by
    # -19, 23 by 1, 24 by -24; downwards 18 by 5, 19 by 5, 23 by -23, 24 by -24.
    input = torch.arange(25.0, device=device).reshape(1, 1, 5, 5)
    offset = torch.zeros(1, 2, 1, 1, device=device, requires_grad=True)
    box = torch.tensor([[0.0, 2.5, 2.5, 4.5, 4.5]], device=device)
    output = deform_roi_pool(input, box, offset, 1, gamma=0.5, mode="bin")
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    assert gradient.flatten().tolist() == [-41 / 4, -37 / 4]
