# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The parts in a stock trainer, as in docs/training.md, and checkpoints of version 0.1."""

from __future__ import annotations

import json
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from iopath.common.file_io import PathHandler
from torch.optim.lr_scheduler import MultiStepLR, _LRScheduler

from detectron2.config import get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dcn_plugin.engine import Trainer, read_config, write_results
from dcn_plugin.evaluation import DetectionEvaluator
from dcn_plugin.messages import UserError
from tests.test_train_net import ITERATIONS, arguments, read_metrics

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = Path(__file__).parent / "data/model_0.1.pth"


def train(
    kind: type[DefaultTrainer], data: str, output: Path, iterations: int, **keys: object
) -> DefaultTrainer:
    """Trains for some iterations in all, and resumes if there is a checkpoint."""
    more = {
        "SOLVER.MAX_ITER": iterations,
        "TEST.EVAL_PERIOD": 0,
        "DATASETS.TEST": "()",
        "SOLVER.WARMUP_ITERS": 0,
        **keys,
    }
    cfg = read_config(arguments(data, output, **more))
    output.mkdir(exist_ok=True)
    torch.manual_seed(1)  # of the initial weights
    trainer = kind(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


@pytest.fixture
def documented() -> type[DefaultTrainer]:
    """The trainer of docs/training.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "class Trainer(DefaultTrainer)" in block]
    names: dict = {}
    exec(code.replace("period=20", "period=2"), names)
    return names["Trainer"]


def test_the_documented_trainer_resumes_exactly(documented, tiny_coco, tmp_path) -> None:
    assert documented.__base__ is DefaultTrainer
    whole = train(documented, tiny_coco, tmp_path / "whole", 4)
    train(documented, tiny_coco, tmp_path / "parts", 2)
    resumed = train(documented, tiny_coco, tmp_path / "parts", 4)
    assert resumed.start_iter == 2
    for (name, value), other in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert any("offsets/backbone" in key for m in read_metrics(tmp_path / "whole") for key in m)


@pytest.mark.parametrize(
    "stock, key, value, message",
    [
        (False, "MODEL.ROI_HEADS.NUM_CLASSES", 3, r"cls_score.weight has the shape \(3, 64\)"),
        (True, "MODEL.ROI_HEADS.NUM_CLASSES", 3, r"cls_score.weight has the shape \(3, 64\)"),
        (False, "MODEL.RESNETS.DEFORM_LAST", "[0,0,0,0]", "parameters in groups of"),
        (False, "SOLVER.OPTIMIZER", "AdamW", "no betas and eps, which AdamW needs"),
    ],
)
def test_another_model_or_optimizer_is_not_resumed(
    stock, key, value, message, documented, tiny_coco, tmp_path
) -> None:
    kind = documented if stock else Trainer
    train(kind, tiny_coco, tmp_path, 1)
    with pytest.raises(UserError, match=message):
        train(kind, tiny_coco, tmp_path, 2, **{key: value})


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_a_run_without_amp_is_resumed_with_it(tiny_coco, tmp_path) -> None:
    train(Trainer, tiny_coco, tmp_path, 1)
    resumed = Trainer(read_config(arguments(tiny_coco, tmp_path, **{"SOLVER.AMP.ENABLED": True})))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1


def test_a_trainer_with_a_stock_loader_trains_and_resumes(tiny_coco, tmp_path) -> None:
    class StockLoader(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg)

    train(StockLoader, tiny_coco, tmp_path, 1)
    resumed = train(StockLoader, tiny_coco, tmp_path, 2)
    assert resumed.start_iter == 1
    assert len(resumed.optimizer.state_dict()["state"]) > 50


def test_a_backbone_that_ignores_deform_last_is_an_error(tiny_coco, tmp_path) -> None:
    keys = {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "DATASETS.TEST": "()"}
    with pytest.raises(ValueError, match="DEFORM_LAST"):
        Trainer(read_config(arguments(tiny_coco, tmp_path, **keys)))


def test_a_custom_evaluator_is_used_with_augmentation(tiny_coco, tmp_path) -> None:
    class Custom(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):  # with the arguments of DefaultTrainer
            return DetectionEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    class Without(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            raise NotImplementedError

    cfg = read_config(arguments(tiny_coco, tmp_path, **{"TEST.AUG.MIN_SIZES": "(64,)"}))
    model = Trainer.build_model(cfg)
    assert Custom.test_with_TTA(cfg, model).keys() == {"bbox_TTA"}
    assert (tmp_path / "inference_TTA/coco_instances_results.json").is_file()
    assert Without.test_with_TTA(cfg, model) == {}


def test_results_that_are_not_finite_are_null(tmp_path) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    bbox = {"AP": np.float64(1.5), "APs": np.nan, "APm": -np.inf, "AP-disc": torch.tensor(2.0)}
    write_results(cfg, {"a": {"bbox": bbox}, "b": {}})
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    expected = {"AP": 1.5, "APs": None, "APm": None, "AP-disc": 2.0}
    assert written == {"a": {"bbox": expected}, "b": {}}


def test_empty_results_are_written(tiny_coco, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(DetectionEvaluator, "evaluate", lambda self: {})  # as on COCO's test-dev
    Trainer(read_config(arguments(tiny_coco, tmp_path, **{"SOLVER.MAX_ITER": 1}))).train()
    assert json.loads((tmp_path / "results.json").read_text()) == {}


def multi_step_multiplier(optimizer: torch.optim.Optimizer) -> MultiStepParamScheduler:
    return MultiStepParamScheduler([1, 0.1, 0.01], milestones=[1, 2], num_updates=4)


class RecursiveScheduler(MultiStepLR, _LRScheduler):  # Detectron2 0.6 saves _LRSchedulers only
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, [1, 2])


@pytest.mark.parametrize("build_scheduler", [multi_step_multiplier, RecursiveScheduler])
def test_custom_schedulers_resume(build_scheduler, tiny_coco, tmp_path) -> None:
    class Custom(Trainer):
        @classmethod
        def build_lr_scheduler(cls, cfg, optimizer):
            return build_scheduler(optimizer)

    train(Custom, tiny_coco, tmp_path, 2)
    resumed = train(Custom, tiny_coco, tmp_path, 3)
    assert resumed.start_iter == 2
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.001 * 0.01)


class Remote(PathHandler):
    """Stands for a remote file system, below a local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _get_supported_prefixes(self) -> list[str]:
        return ["remote://"]

    def local(self, path: str) -> Path:
        return self.folder / path.removeprefix("remote://")

    def _open(self, path, mode="r", buffering=-1, **options):
        return self.local(path).open(mode)

    def _exists(self, path, **options):
        return self.local(path).exists()

    def _isfile(self, path, **options):
        return self.local(path).is_file()

    def _mkdirs(self, path, **options):
        self.local(path).mkdir(parents=True, exist_ok=True)

    def _get_local_path(self, path, force=False, **options):
        return str(self.local(path))


def test_output_dir_may_be_any_of_path_managers(tiny_coco, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "build_writers", lambda self: [])  # TensorBoard has its own paths
    (tmp_path / "remote/run").mkdir(parents=True)
    monkeypatch.setattr(PathManager, "_path_handlers", {**PathManager._path_handlers})
    PathManager.register_handler(Remote(tmp_path / "remote"))
    keys = {"OUTPUT_DIR": "remote://run", "SOLVER.MAX_ITER": 1}
    results = Trainer(read_config(arguments(tiny_coco, tmp_path, **keys))).train()
    written = json.loads((tmp_path / "remote/run/results.json").read_text())
    assert written["bbox"].keys() == results["bbox"].keys()
    trainer = Trainer(read_config(arguments(tiny_coco, tmp_path, **keys)))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 1


KEYS_0_1 = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.BLOCKS": "[1,1,1,1]",
    "MODEL.RESNETS.DEFORM_LAST": "[0,0,0,1]",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 2,
    "MODEL.RESNETS.REDUCED_CHANNELS": 8,
    "MODEL.RPN.CONV_DIMS": "[8]",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[24, 48]]",
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.STEPS": "()",
    "SEED": -1,  # 1 in the checkpoint
    "DATASETS.TEST": "()",
}


def test_resumes_a_checkpoint_of_version_0_1(tiny_coco, tmp_path) -> None:
    shutil.copy(CHECKPOINT, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    keys = {**KEYS_0_1, "DATASETS.TRAIN": f"('{tiny_coco}',)", "OUTPUT_DIR": tmp_path}
    keys["SOLVER.MAX_ITER"] = ITERATIONS + 1
    config = ROOT / "configs/VOC-Detection/faster_rcnn_R_101_dconv3_droi_joint.yaml"
    words = [str(word) for pair in keys.items() for word in pair]
    trainer = Trainer(read_config(Namespace(config_file=str(config), opts=words)))
    trainer.resume_or_load(resume=True)
    saved = torch.load(CHECKPOINT, weights_only=True)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved["model"][name]), name
    momentum = saved["trainer"]["_trainer"]["optimizer"]["state"]
    resumed = trainer.optimizer.state_dict()["state"]
    assert momentum.keys() == resumed.keys()
    for index, state in momentum.items():
        assert torch.equal(resumed[index]["momentum_buffer"], state["momentum_buffer"])
    assert trainer.start_iter == ITERATIONS and trainer.data_loader.seed == 1
    trainer.train()
    assert trainer.iter == ITERATIONS + 1
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]
    assert again["hooks"]["ExactResume"] == {"seed": 1}


def test_a_final_checkpoint_that_was_not_written_is_written_at_the_end(
    tiny_coco, tmp_path, caplog
) -> None:
    period = {"SOLVER.CHECKPOINT_PERIOD": 1}
    train(Trainer, tiny_coco, tmp_path, 1, **period)  # its model_final.pth stays
    train(Trainer, tiny_coco, tmp_path, 2, **period)
    final = tmp_path / "model_final.pth"
    whole = torch.load(final, weights_only=True)
    final.write_bytes(final.read_bytes()[:100])
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert train(Trainer, tiny_coco, tmp_path, 2, **period).start_iter == 2
    again = torch.load(final, weights_only=True)
    assert again["iteration"] == 1 and again["trainer"].keys() == whole["trainer"].keys()
    assert all(torch.equal(again["model"][name], value) for name, value in whole["model"].items())
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert "nothing is trained" not in caplog.text
    train(Trainer, tiny_coco, tmp_path, 1, **period)
    assert "trained for 2 iterations, SOLVER.MAX_ITER is 1: nothing is trained" in caplog.text


def test_an_error_in_the_last_step_is_followed_by_no_evaluation(
    tiny_coco, tmp_path, monkeypatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    keys = {"SOLVER.MAX_ITER": 1, "TEST.EVAL_PERIOD": 0}
    trainer = Trainer(read_config(arguments(tiny_coco, tmp_path, **keys)))
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Trainer, "test", lambda *arguments: pytest.fail("evaluated"))
    with pytest.raises(UserError, match=r"model_final\.pth cannot be written, No space left"):
        trainer.train()
