# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Cell i of a feature of stride s is centred on pixel s * i.

Appendix B: a network must not shift its features. Measured here by gradients, on the networks
themselves, at full depth.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .backbones import build, slim_config

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 16, "reduced": 16}
LONG, SHORT = 2752, 32  # pixels; receptive fields of the middle end within the long side


def linear_on_positive(backbone: nn.Module) -> nn.Module:
    """Makes all weights positive, so that no ReLU blocks a gradient."""
    for name, parameter in backbone.named_parameters():
        if "_offset" not in name:
            parameter.data.abs_()
    return backbone


def receptive_field(feature: Tensor, image: Tensor, cell: int) -> tuple[int, int]:
    """Returns the first and last column of pixels in the receptive field of a column of cells."""
    (gradient,) = torch.autograd.grad(feature[..., cell].sum(), image, retain_graph=True)
    columns = gradient.abs().sum(dim=(0, 1, 2)).nonzero()
    return int(columns.min()), int(columns.max())


@pytest.mark.parametrize("stride_in_1x1", [True, False])
@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize(
    "name", ["build_aligned_inception_resnet_backbone", "build_deform_resnet_backbone"]
)
def test_cell_i_is_centred_on_pixel_stride_times_i(
    name: str, axis: str, stride_in_1x1: bool
) -> None:
    cfg = slim_config(
        DEPTH=101,
        OUT_FEATURES=list(STRIDES),
        DEFORM_LAST=[0, 0, 0, 3],
        REDUCED_CHANNELS=4,
        STRIDE_IN_1X1=stride_in_1x1,
    )
    backbone = linear_on_positive(build(name, cfg))
    image = torch.rand(1, 3, SHORT, LONG, dtype=torch.float64, requires_grad=True)
    features = backbone(image if axis == "x" else image.transpose(2, 3))
    for feature, stride in STRIDES.items():
        maps = features[feature] if axis == "x" else features[feature].transpose(2, 3)
        assert maps.shape[-1] == LONG // stride
        middle = LONG // stride // 2
        for cell in (middle, middle + 3):
            first, last = receptive_field(maps, image, cell)
            assert first > 0 and last < LONG - 1  # not cut by the border
            assert (first + last) / 2 == stride * cell, (feature, first, last)
