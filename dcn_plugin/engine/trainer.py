# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's trainer with this project's optimizer, checkpointer and monitor."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from dcn_plugin.compat import INNER_TRAINER
from dcn_plugin.data import TrainLoader, build_train_loader
from dcn_plugin.evaluation import NetworkSizeMapper, at_network_size, build_evaluator
from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta

from .checkpoint import Checkpointer
from .image_seeds import ImageSeeds
from .network import lay_out
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer, lay_out_state
from .run_folder import write_results

SEED = "seed"  # of checkpoints


def check_same_checkpoint(checkpointer: Checkpointer) -> None:
    """Checks that all processes go on from the same iteration: else they wait for ever."""
    found = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else "none"
    names = {os.path.basename(name) for name in comm.all_gather(found)}
    if len(names) > 1:
        raise ValueError(
            "OUTPUT_DIR must be one folder that all machines share, to resume: their last "
            f"checkpoints are {', '.join(sorted(names))}"
        )


def uses_tta(cfg: CfgNode) -> bool:
    """Returns whether the config asks for test-time augmentation or box averaging."""
    return cfg.TEST.AUG.ENABLED or cfg.TEST.BOX_AVERAGING.ENABLED


class Trainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` for networks with offset branches.

    Its checkpoints hold the optimizer's state, which those of Detectron2 0.6 lack: there a resumed
    training begins without momentum. Images, their augmentation and the samples of anchors and RoIs
    follow from SEED, the iteration and the image: a restart changes nothing, nor do the numbers of
    processes and workers.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Builds all that training needs.

        Args:
            cfg: of the training; SEED below 0: any seed, which checkpoints keep.
        """
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        cfg.freeze()
        self.image_seeds = ImageSeeds(cfg.SEED)
        super().__init__(cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with learning rates of their own for offset branches."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds Detectron2's network; MODEL.CHANNELS_LAST says how it lies in memory."""
        return lay_out(cfg, super().build_model(cfg))

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Builds a loader that can begin at any iteration."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Builds Detectron2's loader; TEST.SEM_SEG_AT_NETWORK_SIZE hides the images' own size."""
        mapper = NetworkSizeMapper(cfg, False) if at_network_size(cfg, dataset_name) else None
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Makes the evaluator of one data set; its results go to OUTPUT_DIR/inference."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates with TEST.AUG or TEST.BOX_AVERAGING, on images at their original size.

        Args:
            cfg: with DATASETS.TEST.
            model: not yet wrapped for augmentation.

        Returns:
            results by task, with `_TTA` at the end of their names.
        """
        wrapped = build_model_with_tta(cfg, model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        if not cfg.TEST.SEM_SEG_AT_NETWORK_SIZE:
            # TTA resizes: an image that the loader has resized already would lose detail.
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.MIN_SIZE_TEST = 0
            cfg.freeze()
        results = cls.test(cfg, wrapped, evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}

    def _test_with_tta(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results

    def build_hooks(self) -> list[HookBase]:
        """Returns Detectron2's hooks, after this project's two."""
        # Here, because DefaultTrainer has made its own, and gives it to its hooks next.
        self.checkpointer = Checkpointer(
            self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        stock = super().build_hooks()
        if uses_tta(self.cfg):
            build_model_with_tta(self.cfg, self.model)  # fails now rather than after training
            # Once, at the end, before the PeriodicWriter, which only the main process has.
            at = len(stock) - int(comm.is_main_process())
            stock.insert(at, hooks.EvalHook(0, self._test_with_tta))
        return [
            self.image_seeds,
            OffsetMonitor(self.model, self.cfg.OFFSET_MONITOR_PERIOD),
            *stock,
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads weights as Detectron2 does; a resumed training goes on with the next images.

        Args:
            resume: whether to go on from the last checkpoint in OUTPUT_DIR, if there is one.

        Raises:
            ValueError: if not all processes see the same checkpoint.
        """
        if resume:
            check_same_checkpoint(self.checkpointer)
        super().resume_or_load(resume)
        loader = self._trainer.data_loader
        if isinstance(loader, TrainLoader):  # nothing was read yet
            loader.start, loader.seed = self.start_iter, self.image_seeds.seed

    def train(self) -> dict[str, Any] | None:
        """Trains, and writes what the last evaluation found to OUTPUT_DIR/results.json.

        Returns:
            these results in the main process, if there were any.
        """
        super().train()
        results = getattr(self, "_last_eval_results", None)
        if results is not None:
            write_results(self.cfg, results)
        return results

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed training needs beside the model."""
        own = {INNER_TRAINER: self._trainer.state_dict(), SEED: self.image_seeds.seed}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes; a checkpoint without the optimizer's state, of Detectron2 0.6, is resumed too.

        Learning rates and schedule are those of the config, which may have changed since.

        Args:
            state_dict: what `state_dict` returned.
        """
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        # Not DefaultTrainer's, which on Detectron2's main needs what version 0.6 does not save.
        TrainerBase.load_state_dict(self, state_dict)
        if INNER_TRAINER in state_dict:
            self._trainer.load_state_dict(state_dict[INNER_TRAINER])
            lay_out_state(self.optimizer)
        self.image_seeds.seed = state_dict.get(SEED, self.image_seeds.seed)
        self.scheduler.base_lrs = rates
        now = self.scheduler.get_lr()
        for group, rate, lr in zip(self.optimizer.param_groups, rates, now, strict=True):
            group["initial_lr"], group["lr"] = rate, lr
