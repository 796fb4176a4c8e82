# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Each family of configs from end to end, on small data sets in the format of the real ones."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import dump_proposals
import prepare_sbd
import pytest
import torch

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

import train_net
from tests.datasets import data_sets_in
from tests.tiny_coco import write_tiny_coco
from tests.tiny_voc import write_tiny_cityscapes, write_tiny_sbd, write_tiny_voc

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SLIM = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.BLOCKS": "[1, 1, 1, 3]",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.REDUCED_CHANNELS": 32,
    "MODEL.RPN.CONV_DIMS": "[32]",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.ROI_HEADS.OHEM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[24, 48]]",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "TEST.AUG.MIN_SIZES": "(48, 64)",
    "TEST.DETECTIONS_PER_IMAGE": 20,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SEED": 1,
}
JOINT = {"MODEL.LOAD_PROPOSALS": False, "MODEL.PROPOSAL_GENERATOR.NAME": "RPN"}
FAMILIES = {
    "VOC-Detection/faster_rcnn_R_101_dconv3_droi_joint": "bbox/AP70",
    "VOC-Detection/rfcn_R_101_dconv3_droi_joint": "bbox/AP70",
    "VOC-Detection/ca_rpn_R_101_atrous4": "bbox/AP70",
    "VOC-Segmentation/deeplab_R_101_dconv3": "sem_seg/mIoU",
    "Cityscapes-Segmentation/deeplab_R_101_atrous8": "sem_seg/mIoU",
    "COCO-Detection/rfcn_AIR_dconv3_droi_ms_avg": "bbox_TTA/AP",
    "COCO-Detection/faster_rcnn_AIR_plain": "bbox/AP",
    "COCO-Detection/ca_rpn_R_101_dconv3": "bbox/AP",
}


# Their architecture, backbone and data set are each in another family too.
SLOW = ("COCO-Detection/faster_rcnn_AIR_plain", "COCO-Detection/ca_rpn_R_101_dconv3")


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Registers small versions of VOC, SBD, Cityscapes and COCO."""
    folder = tmp_path_factory.mktemp("datasets")
    write_tiny_voc(folder)
    write_tiny_sbd(folder / "sbd", folder / "VOC2012")
    prepare_sbd.prepare(folder / "sbd", folder / "VOC2012")
    write_tiny_cityscapes(folder)
    (folder / "coco/annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        path = write_tiny_coco(folder / f"coco/{split}2017", images=count)
        content = json.loads(path.read_text())
        # All categories of COCO, of which the images show the first two.
        content["categories"] = [
            {"id": item["id"], "name": item["name"]} for item in COCO_CATEGORIES if item["isthing"]
        ]
        path = folder / f"coco/annotations/instances_{split}2017.json"
        path.write_text(json.dumps(content))
    with data_sets_in(str(folder)):
        yield folder


def run(name: str, output: Path, *, flags: dict[str, bool] | None = None, **more: object) -> dict:
    """Runs main of train_net.py on a config; `more` are keys, with __ for dots."""
    keys = {**SLIM, "OUTPUT_DIR": output, **{k.replace("__", "."): v for k, v in more.items()}}
    args = Namespace(
        config_file=str(CONFIGS / f"{name}.yaml"),
        opts=[str(word) for pair in keys.items() for word in pair],
        **{"resume": False, "eval_only": False, **(flags or {})},
    )
    return train_net.main(args)


def metric_of(results: dict, path: str) -> float:
    task, metric = path.split("/")
    return results[task][metric]


COCO = {  # instead of trainval and test-dev
    "DATASETS__TRAIN": "('coco_2017_train',)",
    "DATASETS__TEST": "('coco_2017_val',)",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES],
)
def test_trains_resumes_and_evaluates(name: str, tmp_path: Path) -> None:
    more = COCO if name.startswith("COCO") else {}
    whole = run(name, tmp_path / "whole", SOLVER__MAX_ITER=4, SOLVER__STEPS="(3,)", **more)
    assert math.isfinite(metric_of(whole, FAMILIES[name]))
    saved = json.loads((tmp_path / "whole/results.json").read_text())
    assert metric_of(saved, FAMILIES[name]) == metric_of(whole, FAMILIES[name])
    for file in ("config.yaml", "log.txt", "metrics.json", "model_final.pth"):
        assert (tmp_path / "whole" / file).is_file(), file

    first = {"SOLVER__MAX_ITER": 2, "SOLVER__STEPS": "(3,)", "TEST__AUG__ENABLED": False}
    run(name, tmp_path / "parts", **{**first, "TEST__BOX_AVERAGING__ENABLED": False, **more})
    rest = {"SOLVER__MAX_ITER": 4, "SOLVER__STEPS": "(3,)", "flags": {"resume": True}}
    resumed = run(name, tmp_path / "parts", **rest, **more)
    assert metric_of(resumed, FAMILIES[name]) == metric_of(whole, FAMILIES[name])
    weights = [
        torch.load(tmp_path / part / "model_final.pth", weights_only=True)["model"]
        for part in ("whole", "parts")
    ]
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key

    flags = {"eval_only": True}
    path = tmp_path / "whole/model_final.pth"
    again = run(name, tmp_path / "again", flags=flags, MODEL__WEIGHTS=path, **more)
    for task in whole:
        assert again[task] == pytest.approx(whole[task], nan_ok=True), task


def test_precomputed_proposals_are_written_and_used(tmp_path: Path) -> None:
    run("VOC-Detection/rpn_R_101", tmp_path / "rpn", SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    names = [f"voc_{year}_trainval_no_difficult" for year in (2007, 2012)] + ["voc_2007_test"]
    words = ["--config-file", str(tmp_path / "rpn/config.yaml"), "--output", str(tmp_path)]
    weights = ["MODEL.WEIGHTS", str(tmp_path / "rpn/model_final.pth")]
    words += [word for name in names for word in ("--dataset", name)]
    dump_proposals.main([*words, *weights])
    files = [str(tmp_path / f"{name}.pkl") for name in names]
    fixed = {
        "DATASETS__PROPOSAL_FILES_TRAIN": tuple(files[:2]),
        "DATASETS__PROPOSAL_FILES_TEST": tuple(files[2:]),
    }
    steps = {"SOLVER__MAX_ITER": 2, "SOLVER__STEPS": "()"}
    results = run("VOC-Detection/rfcn_R_101_dconv3_droi", tmp_path / "rfcn", **steps, **fixed)
    assert math.isfinite(results["bbox"]["AP70"])


def test_test_dev_writes_the_file_for_cocos_server(root: Path, tmp_path: Path) -> None:
    content = json.loads((root / "coco/annotations/instances_val2017.json").read_text())
    del content["annotations"]
    (root / "coco/annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    (root / "coco/test2017").symlink_to(root / "coco/val2017")
    flags = {"eval_only": True}
    run("COCO-Detection/rfcn_R_101_plain", tmp_path, flags=flags)
    found = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert found and {"image_id", "category_id", "bbox", "score"} <= found[0].keys()


@pytest.mark.slow
def test_a_table_of_real_runs(root: Path, tmp_path: Path) -> None:
    keys = {**SLIM, "SOLVER.MAX_ITER": 2, "SOLVER.STEPS": "()"}
    command = [sys.executable, str(CONFIGS.parent / "tools/run_table.py"), "--table", "1"]
    command += ["--only", "*ca_rpn*_dconv[13]", "--output", str(tmp_path)]
    command += [str(word) for pair in keys.items() for word in pair]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "category-aware RPN" in line]
    assert len(lines) == 2 and "not run" not in done.stdout and "0 of 2 runs failed" in done.stdout
    assert (tmp_path / "VOC-Detection/ca_rpn_R_101_dconv3/seed_1/model_final.pth").is_file()
