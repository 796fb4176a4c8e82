# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Every config builds the model that its name says, and cites the paper's numbers."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from table.paper import TABLES, Cell, cells_of

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from dcn_plugin.engine import read_config
from dcn_plugin.modeling import check_deformable
from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LEAVES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.glob("*/*.yaml")
    if not path.name.startswith("Base-") and path.parent.name != "Base"
)
CELLS = {cell.config: cell for table in (*TABLES, "5") for cell in cells_of(table)}
DEFORMED = {"plain": 0, "droi": 0, "dconv1": 1, "dconv2": 2, "dconv3": 3, "dconv6": 6}


def config(name: str) -> CfgNode:
    return read_config(Namespace(config_file=str(CONFIGS / f"{name}.yaml"), opts=[]))


def test_every_row_of_the_paper_has_a_config() -> None:
    assert CELLS.keys() <= set(LEAVES)
    assert len(cells_of("1")) == 25 and len(cells_of("3")) == 7 * 5 - 6 and len(cells_of("5")) == 14


@pytest.mark.parametrize("name", LEAVES)
def test_builds_the_model_of_its_name(name: str) -> None:
    cfg = config(name)
    with torch.device("meta"):
        cfg.MODEL.DEVICE = "meta"
        model = build_model(cfg)
    check_deformable(cfg, model)
    stem = name.split("/")[1]
    branches = {n.rpartition(".")[0] for n, _ in model.named_parameters() if "offset" in n}
    in_backbone = {branch for branch in branches if branch.startswith("backbone.")}
    expected = max(DEFORMED.get(part, 0) for part in stem.split("_"))
    if "dconv_c3-c5" in stem:
        expected = 4 + 6 + 3
    assert len(in_backbone) == expected * (2 if "AIR" in stem else 1)
    in_heads = {"faster_rcnn": 1, "mask_rcnn": 1, "rfcn": 2}.get(
        re.split("_R_|_AIR|_slim", stem)[0], 0
    )
    if "FPN" in stem:  # an offset branch for each of p2 to p5
        in_heads *= 4
    assert len(branches - in_backbone) == (in_heads if "droi" in stem else 0)
    dilation = re.search(r"atrous(\d)", stem)
    usual = 1 if "FPN" in cfg.MODEL.BACKBONE.NAME.upper() else 2
    assert (int(dilation[1]) if dilation else usual) == cfg.MODEL.RESNETS.RES5_DILATION
    if "_joint" in stem or "VOC-Detection" not in name or "rpn" in stem:
        assert not cfg.MODEL.LOAD_PROPOSALS
    else:
        assert len(cfg.DATASETS.PROPOSAL_FILES_TRAIN) == len(cfg.DATASETS.TRAIN) == 2


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_comments_cite_the_papers_numbers(cell: Cell) -> None:
    first, second = (CONFIGS / f"{cell.config}.yaml").read_text().splitlines()[:2]
    tables = [
        table for table in (*TABLES, "5") if cell.config in {c.config for c in cells_of(table)}
    ]
    noun = "Table" if len(tables) == 1 else "Tables"
    assert first == f"# {noun} {' and '.join(tables)}: {said(cell.metrics, cell.paper)}."
    assert second == f"# Authors' release: {said(cell.metrics, cell.released)}."


def said(metrics: tuple[str, ...], values: tuple[float, ...] | None) -> str:
    if values is None:
        return "none"
    names = (metric.split("/")[1] for metric in metrics)
    return ", ".join(f"{name} {value:.1f}" for name, value in zip(names, values, strict=True))


def test_the_schedules_are_the_papers() -> None:
    for folder, steps, iterations in (
        ("VOC-Detection/rfcn", 20000, 30000),
        ("COCO-Detection/rfcn", 160000, 240000),
        ("VOC-Segmentation/deeplab", 20000, 30000),
        ("Cityscapes-Segmentation/deeplab", 30000, 45000),
    ):
        solver = config(f"{folder}_R_101_plain").SOLVER
        assert (steps,) == solver.STEPS and iterations == solver.MAX_ITER
        # 0.0005 per image, as in the authors' release, with a warmup of a thousand iterations at a
        # tenth, except for segmentation of VOC.
        assert pytest.approx(0.0005) == solver.BASE_LR / solver.IMS_PER_BATCH
        assert solver.WARMUP_FACTOR == 0.1
        warmup = 0 if folder.startswith("VOC-Seg") else 1000
        assert warmup == solver.WARMUP_ITERS


def test_shapes_configs_differ_as_their_names_say() -> None:
    for network in ("ca_rpn", "deeplab", "faster_rcnn", "rfcn"):
        stem = f"Shapes/{network}_slim"
        sizes = {}
        for difference in ("plain", "plain_wide", "dconv3", "atrous8"):
            cfg = config(f"{stem}_{difference}")
            suffix = "_sem_seg" if network == "deeplab" else ""
            names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
            assert names == [f"shapes_hard_{split}{suffix}" for split in ("train", "test")]
            cfg.MODEL.DEVICE = "meta"
            with torch.device("meta"):
                sizes[difference] = sum(p.numel() for p in build_model(cfg).parameters())
        assert sizes["atrous8"] == sizes["plain"]
        # The control has at least as many parameters as the deformable model, at most 2.5% more.
        assert 1 <= sizes["plain_wide"] / sizes["dconv3"] < 1.025
        full = config(f"Shapes/{network}_R_50_dconv3")
        assert list(full.DATASETS.TRAIN) == [f"shapes_large_train{suffix}"]


def test_losses_are_the_authors() -> None:
    for folder in ("VOC-Detection", "COCO-Detection"):
        for network in ("faster_rcnn", "rfcn"):
            model = config(f"{folder}/{network}_R_101_plain").MODEL
            assert model.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
            assert pytest.approx(1 / 9, rel=1e-3) == model.RPN.SMOOTH_L1_BETA
            assert model.ROI_BOX_HEAD.BBOX_REG_WEIGHTS == (10.0, 10.0, 5.0, 5.0)
            assert model.ROI_HEADS.NMS_THRESH_TEST == 0.3


def test_configs_of_a_table_differ_as_their_names_say() -> None:
    plain, other = config("VOC-Detection/rfcn_R_101_plain"), config("VOC-Detection/rfcn_R_101_droi")
    other.MODEL.ROI_BOX_HEAD.DEFORM = False
    assert other == plain
    averaged = config("COCO-Detection/rfcn_AIR_plain_ms_avg")
    assert averaged.TEST.BOX_AVERAGING.ENABLED and len(averaged.TEST.AUG.MIN_SIZES) == 6
    # The plain evaluation of the same run is that of the table's single-scale row.
    assert averaged.INPUT == config("COCO-Detection/rfcn_AIR_plain").INPUT
    with torch.device("meta"):
        averaged.MODEL.DEVICE = "meta"
        assert build_model_with_tta(averaged, build_model(averaged)) is not None
