# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Heads that return NaN or infinity are named; what evaluators drop is in their own tests."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.evaluation.non_finite import warn_of_non_finite_heads
from tests.modeling.networks import build_network

RPN_HEAD = "proposal_generator.rpn_head"


@pytest.mark.parametrize(
    ("network", "part", "heads"),
    [
        ("faster_rcnn", None, ()),
        ("faster_rcnn", "roi_heads.box_predictor.bbox_pred", ("roi_heads.box_predictor",)),
        ("faster_rcnn", "backbone.stem.conv1", (RPN_HEAD,)),  # no proposals for the box head
        ("rfcn", "roi_heads.box_predictor", ("roi_heads.box_predictor",)),
        ("ca_rpn", "proposal_generator.rpn_head", (RPN_HEAD,)),
        ("deeplab", "backbone.stem.conv1", ()),
    ],
)
def test_heads_are_named(network: str, part: str | None, heads: tuple[str, ...], caplog) -> None:
    model = build_network(network, deformable=False).eval()
    for name, parameter in model.named_parameters():
        if part and name.startswith(part):
            parameter.data.fill_(torch.nan)
    with warn_of_non_finite_heads(model), torch.no_grad():
        for _ in range(2):
            model([{"image": torch.rand(3, 64, 64) * 255}])
    assert [record.getMessage().partition(" returned")[0] for record in caplog.records] == [*heads]
    assert all("in 2 batches" in record.getMessage() for record in caplog.records)
    caplog.clear()
    model([{"image": torch.rand(3, 64, 64) * 255}])  # the hooks are removed
    assert not caplog.text
