# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the monitor sees of the offsets, when, and when it warns."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="the monitor is a hook of Detectron2's trainer")

from detectron2.utils.events import EventStorage

from dcn_plugin.engine import OffsetMonitor
from dcn_plugin.layers import DeformConv2dPack

KINDS = ("mean", "max", "outside")


def run(model: nn.Module, monitor: OffsetMonitor, input: torch.Tensor, steps: int) -> EventStorage:
    """Runs the hook as a trainer does."""
    with EventStorage() as storage:
        for iteration in range(steps):
            storage.iter = iteration
            monitor.trainer = SimpleNamespace(iter=iteration)
            monitor.before_step()
            model(input)
            monitor.after_step()
    return storage


def moved(dy: float, dx: float, **layer: int) -> nn.Sequential:
    """Returns a network whose only layer moves every tap by the same."""
    pack = DeformConv2dPack(2, 2, 3, padding=1, **layer)
    with torch.no_grad():
        pack.offset_conv.bias.view(-1, 2).copy_(torch.tensor([dy, dx]))
    return nn.Sequential(pack)


def seen(storage: EventStorage) -> dict[str, float]:
    return {kind: storage.history(f"offsets/0.offset_conv/{kind}").latest() for kind in KINDS}


def test_zero_offsets_show_the_padding_only() -> None:
    model = moved(0, 0)
    found = seen(run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 4, 5), 1))
    # Of 20 * 9 taps those on the ring around the map: 3 * (4 + 5) * 2 - 4 of them.
    assert found == {"mean": 0, "max": 0, "outside": pytest.approx(50 / 180)}


def test_numbers_are_those_of_the_offsets() -> None:
    model = moved(-1.5, 0.5, offset_groups=2)
    found = seen(run(model, OffsetMonitor(model, 1), torch.randn(3, 2, 40, 50), 1))
    assert found["mean"] == pytest.approx(1.0) and found["max"] == pytest.approx(1.5)
    rows = {-1: 2, 0: 1, 1: 0}  # rows of output whose taps leave at the top, by kernel row
    columns = {-1: 0, 0: 0, 1: 1}  # at the right: from 49.5 + 0.5 on, at the left none
    inside = sum((40 - rows[y]) * (50 - columns[x]) for y in (-1, 0, 1) for x in (-1, 0, 1))
    assert found["outside"] == pytest.approx(1 - inside / (9 * 40 * 50))


def test_looks_now_and_then_and_leaves_nothing_behind() -> None:
    model = moved(0, 1)
    storage = run(model, OffsetMonitor(model, 3), torch.randn(1, 2, 8, 8), 8)
    assert [i for _, i in storage.history("offsets/0.offset_conv/mean").values()] == [2, 5]
    assert not model[0].offset_conv._forward_hooks
    assert not run(model, OffsetMonitor(model, 0), torch.randn(1, 2, 8, 8), 3).histories()


@pytest.mark.parametrize(("offset", "warns"), [(3.4, True), (1.0, False)])
def test_warns_once_of_offsets_that_run_away(
    offset: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = moved(offset, offset)
    with caplog.at_level(logging.WARNING, "dcn_plugin.engine.offset_monitor"):
        run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 3)
    assert len(caplog.records) == warns
    if warns:
        assert "0.offset_conv run away: they move taps by 3.4 cells" in caplog.text


def warnings_of(
    model: nn.Module, input: torch.Tensor, caplog: pytest.LogCaptureFixture, steps: int = 2
) -> list[str]:
    name = "dcn_plugin.engine.offset_monitor"
    with caplog.at_level(logging.WARNING, name):
        run(model, OffsetMonitor(model, 1), input, steps)
    return [record.getMessage() for record in caplog.records if record.name == name]


def test_taps_that_padding_puts_off_the_map_are_no_reason_to_warn(caplog) -> None:
    pack = DeformConv2dPack(2, 2, 3, padding=4, dilation=4)  # five of nine taps on a 3 x 3 map
    model = nn.Sequential(pack)
    assert not warnings_of(model, torch.randn(1, 2, 3, 3), caplog)


def test_warns_of_offsets_that_are_no_numbers(caplog) -> None:
    found = warnings_of(moved(float("nan"), 0), torch.randn(1, 2, 8, 8), caplog)
    assert len(found) == 1 and "by nan cells" in found[0]


def test_an_empty_batch_has_no_offsets() -> None:
    model = moved(0, 1)
    storage = run(model, OffsetMonitor(model, 1), torch.randn(0, 2, 8, 8), 2)
    assert not storage.histories()


def test_a_layer_that_is_called_twice_is_one_layer() -> None:
    pack = moved(0, 2)[0]

    class Twice(nn.Module):
        """Looks at an image and at half of it."""

        def __init__(self) -> None:
            """Takes the layer."""
            super().__init__()
            self.layer = pack

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            """Calls it twice."""
            return self.layer(input).sum() + self.layer(input[..., :4]).sum()

    model = Twice()
    storage = run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 1)
    assert storage.history("offsets/layer.offset_conv/mean").latest() == 1
    one, half = (
        seen(run(nn.Sequential(pack), OffsetMonitor(nn.Sequential(pack), 1), image, 1))["outside"]
        for image in (torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 4))
    )
    outside = storage.history("offsets/layer.offset_conv/outside").latest()
    assert one < half and outside == pytest.approx((one + half) / 2)


def test_masks_are_not_offsets() -> None:
    model = nn.Sequential(DeformConv2dPack(2, 2, 3, padding=1, modulated=True))
    with torch.no_grad():
        model[0].offset_conv.bias[18:] = 90
    found = seen(run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 1))
    assert found["mean"] == found["max"] == 0


def test_says_that_a_compiled_network_hides_its_offsets(caplog) -> None:
    model = torch.compile(moved(0, 0), backend="eager")
    image = torch.randn(1, 2, 8, 8)
    model(image)  # compiled now, without hooks
    found = warnings_of(model, image, caplog)
    assert len(found) == 1 and "no offsets were seen in 1 layers" in found[0]


def test_a_network_without_deformable_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    assert not run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 2).histories()
