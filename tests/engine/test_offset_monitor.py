# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What OffsetMonitor logs, and when it warns."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detectron2.utils.events import EventStorage

from dcn_plugin.engine import OffsetMonitor
from dcn_plugin.layers import DeformConv2dPack

KINDS = ("mean", "max", "outside")


def run(model: nn.Module, monitor: OffsetMonitor, input: torch.Tensor, steps: int) -> EventStorage:
    """Calls the hook as a trainer does."""
    with EventStorage() as storage:
        for iteration in range(steps):
            storage.iter = iteration
            monitor.trainer = SimpleNamespace(iter=iteration)
            monitor.before_step()
            model(input)
            monitor.after_step()
    return storage


def constant_offset(dy: float, dx: float, **layer: int) -> nn.Sequential:
    """Returns a model whose only layer has the same offset at every tap."""
    pack = DeformConv2dPack(2, 2, 3, padding=1, **layer)
    with torch.no_grad():
        pack.offset_conv.bias.view(-1, 2).copy_(torch.tensor([dy, dx]))
    return nn.Sequential(pack)


def logged(storage: EventStorage) -> dict[str, float]:
    return {kind: storage.history(f"offsets/0.offset_conv/{kind}").latest() for kind in KINDS}


def test_zero_offsets_count_padding_only() -> None:
    model = constant_offset(0, 0)
    found = logged(run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 4, 5), 1))
    # Of 20 * 9 taps those on the ring around the map: 3 * (4 + 5) * 2 - 4 of them.
    assert found == {"mean": 0, "max": 0, "outside": pytest.approx(50 / 180)}


def test_statistics_by_hand() -> None:
    model = constant_offset(-1.5, 0.5, offset_groups=2)
    found = logged(run(model, OffsetMonitor(model, 1), torch.randn(3, 2, 40, 50), 1))
    assert found["mean"] == pytest.approx(1.0) and found["max"] == pytest.approx(1.5)
    rows = {-1: 2, 0: 1, 1: 0}  # rows of output whose taps leave at the top, by kernel row
    columns = {-1: 0, 0: 0, 1: 1}  # at the right: from 49.5 + 0.5 on, at the left none
    inside = sum((40 - rows[y]) * (50 - columns[x]) for y in (-1, 0, 1) for x in (-1, 0, 1))
    assert found["outside"] == pytest.approx(1 - inside / (9 * 40 * 50))


def test_measures_every_period_and_removes_its_hooks() -> None:
    model = constant_offset(0, 1)
    storage = run(model, OffsetMonitor(model, 3), torch.randn(1, 2, 8, 8), 8)
    assert [i for _, i in storage.history("offsets/0.offset_conv/mean").values()] == [2, 5]
    assert not model[0].offset_conv._forward_hooks
    assert not run(model, OffsetMonitor(model, 0), torch.randn(1, 2, 8, 8), 3).histories()


@pytest.mark.parametrize(("offset", "warns"), [(3.4, True), (1.0, False)])
def test_warns_once_of_diverging_offsets(
    offset: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = constant_offset(offset, offset)
    with caplog.at_level(logging.WARNING, "dcn_plugin.engine.offset_monitor"):
        run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 3)
    assert len(caplog.records) == warns
    if warns:
        assert "0.offset_conv diverge: they move taps by 3.4 pixels" in caplog.text


def warnings_of(
    model: nn.Module, input: torch.Tensor, caplog: pytest.LogCaptureFixture, steps: int = 2
) -> list[str]:
    name = "dcn_plugin.engine.offset_monitor"
    with caplog.at_level(logging.WARNING, name):
        run(model, OffsetMonitor(model, 1), input, steps)
    return [record.getMessage() for record in caplog.records if record.name == name]


def test_taps_outside_by_padding_do_not_warn(caplog) -> None:
    pack = DeformConv2dPack(2, 2, 3, padding=4, dilation=4)  # five of nine taps on a 3 x 3 map
    model = nn.Sequential(pack)
    assert not warnings_of(model, torch.randn(1, 2, 3, 3), caplog)


def test_warns_of_nan(caplog) -> None:
    found = warnings_of(constant_offset(float("nan"), 0), torch.randn(1, 2, 8, 8), caplog)
    assert len(found) == 1 and "by nan pixels" in found[0]


def test_an_empty_batch_logs_nothing() -> None:
    model = constant_offset(0, 1)
    storage = run(model, OffsetMonitor(model, 1), torch.randn(0, 2, 8, 8), 2)
    assert not storage.histories()


def test_calls_of_a_shared_layer_are_merged() -> None:
    pack = constant_offset(0, 2)[0]

    class Twice(nn.Module):
        """Calls the layer on an image and on half of it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = pack

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.layer(input).sum() + self.layer(input[..., :4]).sum()

    model = Twice()
    storage = run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 1)
    assert storage.history("offsets/layer.offset_conv/mean").latest() == 1
    one, half = (
        logged(run(nn.Sequential(pack), OffsetMonitor(nn.Sequential(pack), 1), image, 1))["outside"]
        for image in (torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 4))
    )
    outside = storage.history("offsets/layer.offset_conv/outside").latest()
    assert one < half and outside == pytest.approx((one + half) / 2)


def test_masks_are_not_offsets() -> None:
    model = nn.Sequential(DeformConv2dPack(2, 2, 3, padding=1, modulated=True))
    with torch.no_grad():
        model[0].offset_conv.bias[18:] = 90
    found = logged(run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 1))
    assert found["mean"] == found["max"] == 0


def test_warns_of_a_compiled_model(caplog) -> None:
    model = torch.compile(constant_offset(0, 0), backend="eager")
    image = torch.randn(1, 2, 8, 8)
    model(image)  # compiled now, without hooks
    found = warnings_of(model, image, caplog)
    assert len(found) == 1 and "no offsets were measured in 1 layers" in found[0]


def test_a_model_without_deformable_layers_logs_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    assert not run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 2).histories()
