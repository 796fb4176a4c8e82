# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's trainer with this project's optimizer, checkpointer and monitor."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta

from .checkpoint import Checkpointer
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer

INNER = "_trainer"  # as in checkpoints of Detectron2's main


class Trainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` for networks with offset branches.

    Its checkpoints hold the optimizer's state, which those of Detectron2 0.6 lack: there a resumed
    training begins without momentum.
    """

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with learning rates of their own for offset branches."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> COCOEvaluator:
        """Makes the evaluator of one data set; its results go to OUTPUT_DIR/inference."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(dataset_name, output_dir=folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluates, and again with TEST.AUG or TEST.BOX_AVERAGING if the config says so.

        Args:
            cfg: with DATASETS.TEST.
            model: under test.
            evaluators: one for each data set; None: those of `build_evaluator`.

        Returns:
            results by task; those of the second evaluation have `_TTA` at the end of their names.
        """
        results = super().test(cfg, model, evaluators)
        if cfg.TEST.AUG.ENABLED or cfg.TEST.BOX_AVERAGING.ENABLED:
            folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
            evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
            more = super().test(cfg, build_model_with_tta(cfg, model), evaluators)
            results |= {f"{name}_TTA": value for name, value in more.items()}
        return results

    def build_hooks(self) -> list[HookBase]:
        """Returns Detectron2's hooks, after the `OffsetMonitor`."""
        # Here, because DefaultTrainer has made its own, and gives it to its hooks next.
        self.checkpointer = Checkpointer(
            self.model, self.cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )
        return [
            OffsetMonitor(self.model, self.cfg.OFFSET_MONITOR_PERIOD),
            *super().build_hooks(),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed training needs beside the model."""
        return {**super().state_dict(), INNER: self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes; a checkpoint without the optimizer's state, of Detectron2 0.6, is resumed too.

        Learning rates are those of the config, which may have changed since.

        Args:
            state_dict: what `state_dict` returned.
        """
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        super().load_state_dict(state_dict)
        if INNER in state_dict:
            self._trainer.load_state_dict(state_dict[INNER])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            before = group["initial_lr"]
            group["lr"] = group["lr"] * rate / before if before else rate
            group["initial_lr"] = rate
        self.scheduler.base_lrs = rates
