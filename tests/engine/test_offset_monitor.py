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


def test_a_network_without_deformable_layers_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    assert not run(model, OffsetMonitor(model, 1), torch.randn(1, 2, 8, 8), 2).histories()
