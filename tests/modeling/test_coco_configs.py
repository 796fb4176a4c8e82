# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Configs under Detectron2's names train and evaluate, in Detectron2's own trainers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import detectron2
from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator

from dcn_plugin import add_dcn_config
from dcn_plugin.layers import OffsetBranch
from dcn_plugin.modeling import check_deformable
from tests.datasets import tiny_panoptic
from tests.tiny_coco import CLASSES, write_tiny_coco

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.glob("COCO-*/*_R_50_*dconv_c3-c5*.yaml")
)
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x_dconv_c3-c5"
SLIM = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RETINANET.NUM_CLASSES": len(CLASSES),
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.001,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (),
    "SOLVER.BASE_LR": 0.001,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tiny_panoptic(tmp_path_factory.mktemp("tiny") / "data") as name:
        yield name


def read(name: str, dataset: str, output: Path) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.merge_from_list([part for pair in SLIM.items() for part in pair])
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset,)
    cfg.OUTPUT_DIR = str(output)
    return cfg


class StockTrainer(DefaultTrainer):
    """Detectron2's trainer with the evaluators of its own tools/train_net.py."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluators:
        """Returns the evaluators of boxes, masks and stuff that the config asks for."""
        evaluators = [COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)]
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            evaluators.append(SemSegEvaluator(dataset_name, distributed=False))
        return DatasetEvaluators(evaluators)


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_evaluates(name: str, tiny: str, tmp_path: Path) -> None:
    cfg = read(name, tiny, tmp_path)
    trainer = StockTrainer(cfg)
    check_deformable(cfg, trainer.model)
    branches = {n for n, m in trainer.model.named_modules() if isinstance(m, OffsetBranch)}
    assert len({n for n in branches if n.startswith("backbone.bottom_up.res")}) == 4 + 6 + 3
    assert len(branches) == 13 + (4 if "droi" in name else 0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    results = trainer._last_eval_results
    moved = {n for n, p in trainer.model.named_parameters() if not p.equal(before[n])}
    assert {f"{branch}.bias" for branch in branches if branch.startswith("backbone")} <= moved
    assert results["bbox"].keys() >= {"AP", "AP50", "AP-disc"}
    assert ("segm" in results) == cfg.MODEL.MASK_ON
    assert ("sem_seg" in results) == (name == PANOPTIC)


def test_lazy_config_runs_in_detectron2s_script(tmp_path: Path) -> None:
    script = Path(detectron2.__file__).parents[1] / "tools" / "lazyconfig_train_net.py"
    assert script.is_file(), "this Detectron2 was installed without its tools"
    root = tmp_path / "coco"
    for split in ("train2017", "val2017"):
        path = write_tiny_coco(root / split, images=2)
        content = json.loads(path.read_text())
        content["categories"] = [
            {"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]
        ]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    overrides = {
        "train.device": "cpu",
        "train.init_checkpoint": '""',
        "train.output_dir": tmp_path / "output",
        "train.max_iter": 3,
        "train.eval_period": 3,
        "optimizer.lr": 0.001,
        "model.backbone.bottom_up.stem_channels": 32,
        "model.backbone.bottom_up.res2_channels": 32,
        "model.backbone.bottom_up.width_per_group": 32,
        "model.backbone.bottom_up.norm": "GN",  # works without running statistics
        "model.roi_heads.box_predictor.test_score_thresh": 0.0,
        "model.proposal_generator.post_nms_topk": [50, 50],
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.test.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.short_edge_length": [64],
        "dataloader.test.mapper.augmentations.0.short_edge_length": 64,
    }
    config = CONFIGS / "COCO-Detection" / "faster_rcnn_R_50_FPN_3x_dconv_c3-c5.py"
    done = subprocess.run(
        [sys.executable, script, "--config-file", config]
        + [f"{key}={value}" for key, value in overrides.items()],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, _, metrics = (done.stdout + done.stderr).partition("copypaste: AP,AP50,AP75,APs,APm,APl")
    assert re.search(r"copypaste: [\d.]+,", metrics), metrics
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 2
    branches = [name for name in checkpoint["model"] if name.endswith("conv2_offset.bias")]
    assert len(branches) == 4 + 6 + 3 and all(checkpoint["model"][b].any() for b in branches)
