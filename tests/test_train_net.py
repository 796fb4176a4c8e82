# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training and evaluation by train_net.py."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser

import train_net
from dcn_plugin.engine import Trainer, read_config
from tests.datasets import tiny_keypoints, tiny_lvis, tiny_panoptic

CONFIG = "configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml"
ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 3


def arguments(
    data: str, output: Path, *flags: str, config: str = CONFIG, **more: object
) -> argparse.Namespace:
    """Returns a command line for a small model with random weights; more: other config keys."""
    overrides = {
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "DATASETS.TRAIN": f"('{data}',)",
        "DATASETS.TEST": f"('{data}',)",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "INPUT.MIN_SIZE_TEST": 96,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.001,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.STEPS": "()",
        "SEED": 1,
        "OUTPUT_DIR": output,
        "OFFSET_MONITOR_PERIOD": 2,
        **more,
    }
    options = [str(word) for pair in overrides.items() for word in pair]
    return default_argument_parser().parse_args(
        ["--config-file", str(ROOT / config), *flags, *options]
    )


def run(data: str, output: Path, *flags: str, **more: object) -> dict | None:
    """Runs train_net.py's main."""
    return train_net.main(arguments(data, output, *flags, **more))


MASK_RCNN = "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x_dconv_c3-c5.yaml"
PANOPTIC_FPN = "configs/COCO-PanopticSegmentation/panoptic_fpn_R_50_3x_dconv_c3-c5.yaml"
SMALL_FPN = {
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "[16]",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 2,
}
KEYPOINTS = {
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.KEYPOINT_ON": True,
    # Untrained BatchNorm does not normalize: logits of heatmaps must not underflow in exp().
    "MODEL.PIXEL_STD": "[1000.0, 1000.0, 1000.0]",
}
LVIS = {"MODEL.ROI_HEADS.NUM_CLASSES": 1203}
STOCK_DATA = {
    "keypoints": (tiny_keypoints, MASK_RCNN, KEYPOINTS, "loss_keypoint"),
    "lvis": (tiny_lvis, MASK_RCNN, LVIS, "loss_mask"),
    "panoptic": (tiny_panoptic, PANOPTIC_FPN, {}, "loss_sem_seg"),
}
STOCK_METRICS = {
    "keypoints": {"bbox", "segm", "keypoints"},
    "lvis": {"bbox", "segm"},
    "panoptic": {"sem_seg", "bbox", "segm", "panoptic_seg"},
}


@pytest.mark.parametrize("kind", STOCK_DATA)
def test_trains_on_every_kind_of_data(kind: str, tmp_path: Path) -> None:
    registered, config, keys, loss = STOCK_DATA[kind]
    with registered(tmp_path / "data", 4) as data:
        no_test = {"DATASETS.TEST": "()"}  # the next test evaluates
        run(data, tmp_path / "output", config=config, **SMALL_FPN, **keys, **no_test)
    (metrics,) = [m for m in read_metrics(tmp_path / "output") if "total_loss" in m]
    assert math.isfinite(metrics["total_loss"]) and metrics[loss] > 0


@pytest.mark.parametrize("kind", STOCK_DATA)
def test_evaluates_every_kind_of_data(kind: str, tmp_path: Path) -> None:
    packages = {"lvis": "lvis", "panoptic": "panopticapi"}
    if kind in packages:
        # Not on PyPI, or, lvis, not for NumPy 2.
        pytest.importorskip(packages[kind], reason=f"this evaluator needs {packages[kind]}")
    registered, config, keys, _ = STOCK_DATA[kind]
    with registered(tmp_path / "data", 4) as data:
        output = tmp_path / "output"
        results = run(data, output, "--eval-only", config=config, **SMALL_FPN, **keys)
    assert results.keys() == STOCK_METRICS[kind]


def read_metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def detections(output: Path) -> list[dict]:
    return json.loads((output / "inference/coco_instances_results.json").read_text())


def test_trains_and_evaluates(tiny_coco, tmp_path) -> None:
    output = tmp_path / "output"
    run(tiny_coco, output)
    metrics = read_metrics(output)
    assert all(math.isfinite(m["total_loss"]) for m in metrics if "total_loss" in m)
    assert any("bbox/AP50" in m for m in metrics)
    logged = {name for m in metrics for name in m if name.startswith("offsets/")}
    assert logged == {
        f"offsets/backbone.res5.{block}.conv2_offset/{kind}"
        for block in range(3)
        for kind in ("mean", "max", "outside")
    }

    weights = output / "model_final.pth"
    saved = torch.load(weights, weights_only=True)["model"]
    offset_keys = [key for key in saved if "conv2_offset" in key]
    assert offset_keys == [
        f"backbone.res5.{block}.conv2_offset.{name}"
        for block in range(3)
        for name in ("weight", "bias")
    ]
    # Zero-initialized: that they changed shows that gradients reach them through the op.
    assert all(saved[key].abs().max() > 0 for key in offset_keys)

    run(tiny_coco, tmp_path / "again", "--eval-only", **{"MODEL.WEIGHTS": weights})
    assert detections(output) and detections(tmp_path / "again") == detections(output)
    run(tiny_coco, tmp_path / "random", "--eval-only", SEED=2)
    assert detections(tmp_path / "random") != detections(output)


def test_the_config_is_read_once_and_a_wrong_last_checkpoint_is_overwritten(
    tiny_coco, tmp_path, monkeypatch
) -> None:
    read, calls = train_net.read_config, []
    monkeypatch.setattr(train_net, "read_config", lambda args: calls.append(args) or read(args))
    (tmp_path / "last_checkpoint").write_text("/elsewhere/model_final.pth")
    more = {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": "()"}
    run(tiny_coco, tmp_path, **more)
    assert len(calls) == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    run(tiny_coco, tmp_path, "--eval-only", **more)
    assert len(calls) == 2


def test_resumes_weights_momentum_and_iteration(tiny_coco, tmp_path) -> None:
    run(tiny_coco, tmp_path)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    args = arguments(tiny_coco, tmp_path, "--resume")
    trainer = Trainer(train_net.setup(read_config(args), args))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == ITERATIONS
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"]
    resumed = trainer.optimizer.state_dict()["state"]
    assert momentum.keys() == resumed.keys() and len(momentum) > 50
    for index, state in momentum.items():
        assert torch.equal(resumed[index]["momentum_buffer"], state["momentum_buffer"])
    run(tiny_coco, tmp_path, "--resume", **{"SOLVER.MAX_ITER": ITERATIONS + 1})
    iterations = [m["iteration"] for m in read_metrics(tmp_path) if "total_loss" in m]
    assert iterations[-1] == ITERATIONS


def test_resumes_with_the_learning_rates_of_the_config(tiny_coco, tmp_path) -> None:
    run(tiny_coco, tmp_path)
    slower = {"SOLVER.OFFSET_LR_FACTOR": 0.25, "SOLVER.WARMUP_ITERS": 0}
    args = arguments(tiny_coco, tmp_path, "--resume", **slower)
    trainer = Trainer(train_net.setup(read_config(args), args))
    trainer.resume_or_load(resume=True)
    names = {p: name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            factor = 0.25 if "conv2_offset" in names[parameter] else 1
            assert group["initial_lr"] == pytest.approx(0.001 * factor), names[parameter]
    expected = [group["initial_lr"] for group in trainer.optimizer.param_groups]
    assert trainer.scheduler.base_lrs == expected


@pytest.mark.parametrize("gpus, processes", [(0, 2), (1, 2), (4, 8)])
def test_no_gpus_are_one_process_per_machine(gpus, processes, monkeypatch) -> None:
    found = []
    monkeypatch.setattr(train_net, "check_config", lambda *arguments, **k: found.append(arguments))
    monkeypatch.setattr(train_net, "launch", lambda *arguments: None)
    monkeypatch.setattr(train_net, "read_config", lambda args: None)
    monkeypatch.setattr(sys, "argv", ["x", "--num-gpus", str(gpus), "--num-machines", "2"])
    train_net.invoke_main()
    assert found[0][3] == processes


def test_only_errors_before_training_are_one_line(tiny_coco, tmp_path, monkeypatch) -> None:
    def train(self: Trainer) -> None:
        raise ValueError("in training")

    monkeypatch.setattr(Trainer, "train", train)
    words = {"MODEL.ROI_HEADS.NUM_CLASSES": 2, "DATASETS.TRAIN": f"('{tiny_coco}',)"}
    words |= {"DATASETS.TEST": "()", "MODEL.WEIGHTS": "", "OUTPUT_DIR": tmp_path}
    options = [str(word) for pair in words.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["train_net.py", "--config-file", str(ROOT / CONFIG), *options])
    with pytest.raises(ValueError, match="in training"):
        train_net.invoke_main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "MODEL.DEVICE", "none"])
    with pytest.raises(SystemExit, match=r"train_net: MODEL\.DEVICE must be"):
        train_net.invoke_main()


ON_REDUCED = {
    "MODEL.RESNETS.OUT_FEATURES": "['res4', 'reduced']",
    "MODEL.RESNETS.REDUCED_CHANNELS": 32,
    "MODEL.RPN.IN_FEATURES": "['res4']",
    "MODEL.ROI_HEADS.IN_FEATURES": "['reduced']",
}
ON_PYRAMID = {
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.DEFORM_LAST": [0, 1, 1, 3],
    "MODEL.RESNETS.OUT_FEATURES": "['res2', 'res3', 'res4', 'res5']",
    "MODEL.FPN.IN_FEATURES": "['res2', 'res3', 'res4', 'res5']",
    "MODEL.RPN.IN_FEATURES": "['p2', 'p3', 'p4', 'p5', 'p6']",
    "MODEL.ROI_HEADS.IN_FEATURES": "['p2', 'p3', 'p4', 'p5']",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[16], [32], [64], [128], [256]]",
}


@pytest.mark.parametrize(
    ("backbone", "keys", "branches"),
    [
        ("build_deform_resnet_backbone", ON_REDUCED, 3),
        ("build_deform_resnet_fpn_backbone", ON_PYRAMID, 5),
        ("build_aligned_inception_resnet_backbone", ON_REDUCED, 6),
    ],
)
def test_backbones_train_in_generalized_rcnn(backbone, keys, branches, tiny_coco, tmp_path) -> None:
    run(tiny_coco, tmp_path, **{"MODEL.BACKBONE.NAME": backbone, **keys})
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    offsets = {name: value for name, value in saved.items() if "_offset.weight" in name}
    assert len(offsets) == branches
    assert all(value.abs().max() > 0 for value in offsets.values())
    assert detections(tmp_path)


TTA = {
    "MODEL.ROI_HEADS.NAME": "DeformROIHeads",
    "MODEL.ROI_BOX_HEAD.DEFORM": True,
    "TEST.AUG.ENABLED": True,
    "TEST.AUG.MIN_SIZES": "(64, 96)",
}


@pytest.mark.parametrize("averaging", [False, True])
def test_evaluates_with_test_time_augmentation(averaging, tiny_coco, tmp_path) -> None:
    more = {**TTA, "TEST.BOX_AVERAGING.ENABLED": averaging}
    results = run(tiny_coco, tmp_path, "--eval-only", **more)
    assert results.keys() == {"bbox", "bbox_TTA"}
    assert detections(tmp_path / "inference_TTA") != detections(tmp_path)


def test_training_evaluates_with_augmentation_once_at_the_end(
    tiny_coco, tmp_path, monkeypatch
) -> None:
    sizes = []
    build_test_loader = Trainer.build_test_loader.__func__

    def count_loaders(cls, cfg, dataset_name):
        sizes.append(cfg.INPUT.MIN_SIZE_TEST)
        return build_test_loader(cls, cfg, dataset_name)

    monkeypatch.setattr(Trainer, "build_test_loader", classmethod(count_loaders))
    run(tiny_coco, tmp_path, **TTA, **{"TEST.EVAL_PERIOD": 1, "INPUT.MIN_SIZE_TEST": 64})
    # Three plain evaluations at the size of the config, then one whose loader does not resize.
    assert sizes == [64] * ITERATIONS + [0]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written.keys() == {"bbox", "bbox_TTA"}
    logged = [m["iteration"] for m in read_metrics(tmp_path) if "bbox_TTA/AP50" in m]
    assert logged == [ITERATIONS]


DETECTORS = {
    "faster_rcnn": {"MODEL.ROI_HEADS.NAME": "DeformROIHeads"},
    "rfcn": {"MODEL.META_ARCHITECTURE": "RFCN", "MODEL.ROI_HEADS.NAME": "RFCNROIHeads"},
    "ca_rpn": {
        "MODEL.META_ARCHITECTURE": "CategoryAwareRPN",
        "MODEL.RPN.HEAD_NAME": "CategoryRPNHead",
        "MODEL.RPN.IN_FEATURES": "['reduced']",
    },
}


@pytest.mark.parametrize("network", DETECTORS)
def test_detectors_train(network, tiny_coco, tmp_path) -> None:
    keys = {**ON_REDUCED, **DETECTORS[network], "MODEL.ROI_BOX_HEAD.DEFORM": True}
    run(tiny_coco, tmp_path, **keys, **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.001})
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    offsets = {name: value for name, value in saved.items() if "offset" in name}
    assert len(offsets) == {"faster_rcnn": 8, "rfcn": 10, "ca_rpn": 6}[network]
    assert all(value.abs().max() > 0 for value in offsets.values())
    assert detections(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_an_unreadable_image_ends_the_program_with_one_line(
    flags: tuple[str, ...], workers: int, tiny_coco, tmp_path
) -> None:
    broken = [Path(record["file_name"]) for record in DatasetCatalog.get(tiny_coco)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit) as error:
        run(tiny_coco, tmp_path / "output", *flags, **{"DATALOADER.NUM_WORKERS": workers})
    assert re.fullmatch(
        rf"train_net: {tmp_path}.*/\d+\.png cannot be read as an image: .+", error.value.code
    )
