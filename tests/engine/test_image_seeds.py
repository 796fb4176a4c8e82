# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Samples of anchors and RoIs that follow from the iteration and the image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2", reason="what samples is Detectron2's")

from detectron2.utils.events import EventStorage

from dcn_plugin.engine import ImageSeeds
from tests.modeling.networks import build_network, inputs

FEW = {"ca_rpn": 6, "faster_rcnn": 6}


def sampled(
    network: str, order: list[int], iteration: int = 3, seed: int = 1, noise: int = 0
) -> list[torch.Tensor]:
    """Returns the labels that the anchors of each image were given."""
    torch.manual_seed(0)
    model = build_network(network, True)
    generator = model.proposal_generator
    generator.batch_size_per_image = FEW[network]
    found = []
    original = generator.label_and_sample_anchors

    def look(*args: object) -> object:
        result = original(*args)
        found.extend(result[0])
        return result

    generator.label_and_sample_anchors = look
    hook = ImageSeeds(seed)
    hook.trainer = SimpleNamespace(model=model, iter=iteration)
    hook.before_train()
    torch.rand(noise)
    batch = [{**item, "image_id": number} for number, item in enumerate(inputs())]
    # The same size: the anchors of an image are those of its batch.
    for item in batch:
        item["image"] = torch.zeros(3, 100, 140, dtype=torch.uint8)
    with EventStorage():
        model([batch[number] for number in order])
    hook.after_train()
    assert "_subsample_labels" not in vars(generator) and not model._forward_pre_hooks
    return found


@pytest.mark.parametrize("network", FEW)
def test_the_sample_of_an_image_depends_on_nothing_else(network: str) -> None:
    first, second = sampled(network, [0, 1])
    assert int((first >= 0).sum()) == FEW[network]
    for other in (sampled(network, [0]), sampled(network, [1, 0])[::-1]):
        assert torch.equal(other[0], first)
    assert torch.equal(sampled(network, [0, 1], noise=5)[1], second)


@pytest.mark.parametrize("change", [{"iteration": 4}, {"seed": 2}])
def test_another_iteration_or_seed_draws_another_sample(change: dict[str, int]) -> None:
    first = sampled("faster_rcnn", [0, 1])[0]
    other = sampled("faster_rcnn", [0, 1], **change)[0]
    assert not torch.equal(first, other)
