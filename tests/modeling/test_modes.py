# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Backbones and poolers under autocast, DDP, torch.compile, and in channels_last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.structures import Boxes

from dcn_plugin.layers import OffsetBranch, OffsetConv2d
from dcn_plugin.modeling import DeformROIPooler

from .backbones import build, slim_config

BACKBONES = (
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
    "build_aligned_inception_resnet_backbone",
)
backbones = pytest.mark.parametrize("name", BACKBONES)
FEW_BLOCKS = (1, 1, 2, 3)  # each kind of block, since compilation takes a second per block
BOXES = ((3.0, 5.0, 40.0, 60.0), (10.0, 2.0, 90.0, 50.0))


def images(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


def calibrate(backbone: nn.Module) -> None:
    """Sets the running statistics of norms to those of the input."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        backbone.train()(images())
    backbone.eval()


class Pooled(nn.Module):
    """A backbone and a deformable pooler on its features."""

    def __init__(self, name: str, blocks: tuple[int, ...] = ()) -> None:
        """Makes both, with non-zero offset branches; by default with all blocks of a stage."""
        super().__init__()
        pyramid = "fpn" in name
        cfg = slim_config(
            DEFORM_LAST=[0, 0, 1, 3],
            DEFORM_MODULATED=True,
            BLOCKS=list(blocks),
            RES5_DILATION=1 if pyramid else 2,
            OUT_FEATURES=["res3", "res4", "res5"] if pyramid else ["reduced"],
            REDUCED_CHANNELS=8,
        )
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        self.backbone = build(name, cfg)
        self.features = ["p3", "p4", "p5"] if pyramid else ["reduced"]
        scales = [1 / self.backbone.output_shape()[f].stride for f in self.features]
        self.pooler = DeformROIPooler(
            8, 3, scales, 2, canonical_box_size=64, canonical_level=4
        ).double()
        for module in self.modules():
            if isinstance(module, OffsetBranch):
                nn.init.normal_(module.weight, std=0.02)
        calibrate(self.backbone)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Pools the same boxes of each image."""
        features = self.backbone(image)
        lists = [Boxes(boxes)] * len(image)
        return self.pooler([features[name] for name in self.features], lists)


def error_of_autocast(model: Pooled) -> float:
    image, boxes = images(dtype=torch.float32), torch.tensor(BOXES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = model(image, boxes).float()
    with torch.no_grad():
        expected = model(image, boxes)
    return float((pooled - expected).norm() / expected.norm())


@backbones
def test_autocast_computes_offsets_in_float32(name: str) -> None:
    model = Pooled(name).float()
    dtypes = set()
    branches = [module for module in model.modules() if isinstance(module, OffsetBranch)]
    for branch in branches:
        branch.register_forward_hook(
            lambda branch, inputs, output: dtypes.add(
                (output if isinstance(output, Tensor) else output[0]).dtype
            )
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = model(images(dtype=torch.float32), torch.tensor(BOXES))
    assert dtypes == {torch.float32}
    pooled.float().square().sum().backward()
    for branch in branches:
        if isinstance(branch, OffsetConv2d):
            assert branch.weight.grad.dtype == torch.float32 and branch.weight.grad.abs().max() > 0
    # A random network of fifty layers loses much precision in bfloat16, but not through offsets.
    moved = error_of_autocast(model)
    for branch in branches:
        branch.reset_parameters()
    assert moved < 1.5 * error_of_autocast(model)


@backbones
def test_channels_last_gives_the_same(name: str) -> None:
    model = Pooled(name)
    expected = model(images(), torch.tensor(BOXES))
    model.to(memory_format=torch.channels_last)
    last = images().contiguous(memory_format=torch.channels_last)
    seen = []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(model(last, torch.tensor(BOXES)), expected)
    for feature in seen[0].values():
        assert feature.is_contiguous(memory_format=torch.channels_last)


# The pyramid has the blocks of the plain backbone.
@pytest.mark.parametrize("name", BACKBONES[1:])
def test_backbones_compile_in_one_graph(name: str) -> None:
    backbone = Pooled(name, FEW_BLOCKS).backbone
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    expected, features = backbone(images()), compiled(images())
    for key in expected:
        torch.testing.assert_close(features[key], expected[key])


@pytest.mark.slow
@backbones
def test_backbones_compile_with_inductor(name: str) -> None:
    backbone = Pooled(name, FEW_BLOCKS).backbone.float()
    compiled = torch.compile(backbone, fullgraph=True)
    image = images(dtype=torch.float32)
    expected, features = backbone(image), compiled(image)
    for key in expected:
        torch.testing.assert_close(features[key], expected[key], rtol=1e-3, atol=1e-3)


def gradients_of_one_image(rank: int, name: str, folder: str) -> None:
    """Computes gradients in one of two processes; the first saves their average."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # DDP must broadcast the weights
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(Pooled(name))
    model(images()[rank : rank + 1], torch.tensor(BOXES)).square().sum().backward()
    if rank == 0:
        state = {k: v.clone() for k, v in model.module.state_dict().items()}
        found = {k: p.grad for k, p in model.module.named_parameters()}
        torch.save({"model": state, "gradients": found}, f"{folder}/found.pth")
    dist.barrier()


@pytest.mark.slow
@backbones
def test_two_processes_average_their_gradients(name: str, tmp_path: Path) -> None:
    mp.spawn(gradients_of_one_image, (name, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "found.pth", weights_only=True)
    model = Pooled(name)
    model.load_state_dict(found["model"])
    (model(images(), torch.tensor(BOXES)).square().sum() / 2).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradients"][key], parameter.grad, msg=key)
