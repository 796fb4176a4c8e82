# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A deformable backbone under torch.compile, torch.export and AOTInductor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.testing import assert_close

pytest.importorskip("detectron2", reason="the backbones are Detectron2's")

from .backbones import build, shake, slim_config

SIZES = ((2, 3, 64, 96), (1, 3, 160, 64))


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    cfg = slim_config(DEPTH=18, RES2_OUT_CHANNELS=8, RES5_DILATION=1, DEFORM_LAST=[0, 0, 0, 2])
    network = shake(build("build_deform_resnet_backbone", cfg)).float()
    for name, parameter in network.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.05)
    return network.requires_grad_(False)


def assert_same(found: dict[str, Tensor], backbone: nn.Module, images: Tensor) -> None:
    for name, expected in backbone(images).items():
        assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def export(backbone: nn.Module, strict: bool) -> ExportedProgram:
    height, width = Dim("height", min=2, max=64), Dim("width", min=2, max=64)
    shapes = ({0: Dim("batch"), 2: 32 * height, 3: 32 * width},)
    return torch.export.export(
        backbone, (torch.randn(SIZES[0]),), dynamic_shapes=shapes, strict=strict
    )


def test_compiles_without_graph_breaks(backbone: nn.Module) -> None:
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        images = torch.randn(size)
        assert_same(compiled(images), backbone, images)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_sizes(backbone: nn.Module, strict: bool) -> None:
    program = export(backbone, strict)
    assert str(program.graph).count("dcn_plugin.deform_conv2d") == 2
    for size in SIZES:
        images = torch.randn(size)
        assert_same(program.module()(images), backbone, images)


@pytest.mark.slow
def test_runs_in_aot_inductor(backbone: nn.Module, tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(
        export(backbone, strict=False), package_path=str(tmp_path / "backbone.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for size in SIZES:
        images = torch.randn(size)
        assert_same(loaded(images), backbone, images)


@pytest.mark.slow
def test_compiles_with_inductor(backbone: nn.Module) -> None:
    compiled = torch.compile(backbone, fullgraph=True)
    images = torch.randn(SIZES[0])
    assert_same(compiled(images), backbone, images)
