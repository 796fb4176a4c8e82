# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's trainer with this package's optimizer, checkpointer and hooks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from detectron2 import data
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dcn_plugin.compat import INNER_TRAINER, ddp_on_cpu
from dcn_plugin.data.checked_mapper import CheckedMapper
from dcn_plugin.data.workers import ignore_sigterm_of_others
from dcn_plugin.evaluation import NetworkSizeMapper, at_network_size, build_evaluator
from dcn_plugin.evaluation.non_finite import warn_of_non_finite_heads
from dcn_plugin.modeling import check_deformable
from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta

from .checkpoint import Checkpointer
from .config_checks import is_sem_seg
from .divergence import DivergenceReport, without_traceback
from .exact_resume import ExactResume, ResumableTrainLoader
from .model import set_memory_format
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer, check_state, match_memory_format
from .restricted_pickle import restricted
from .sigterm import StopOnSigterm


class Trainer(DefaultTrainer):
    """`DefaultTrainer` with the optimizer, checkpointer and hooks of this package."""

    def __init__(self, cfg: CfgNode) -> None:
        """Builds model, optimizer, loader and hooks.

        Args:
            cfg: the config; SEED below 0 stands for a random seed, which checkpoints keep.
        """
        with ddp_on_cpu() if cfg.MODEL.DEVICE == "cpu" else contextlib.nullcontext():
            super().__init__(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds Detectron2's model in the memory format of MODEL.CHANNELS_LAST."""
        model = super().build_model(cfg)
        check_deformable(cfg, model)
        return set_memory_format(cfg, model)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with separate learning rates for offset branches."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableTrainLoader:
        """Builds Detectron2's loader, which `ExactResume` starts at any iteration."""
        head, uses_labels = cfg.MODEL.SEM_SEG_HEAD, is_sem_seg(cfg)
        num_labels = head.NUM_CLASSES if uses_labels else None
        mapper = CheckedMapper(DatasetMapper(cfg, True), num_labels, head.IGNORE_VALUE)
        return ResumableTrainLoader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Builds Detectron2's loader; TEST.SEM_SEG_AT_NETWORK_SIZE hides the original size."""
        mapper = NetworkSizeMapper if at_network_size(cfg, dataset_name) else DatasetMapper
        with restricted(data.build):  # proposals
            loader = build_detection_test_loader(
                cfg, dataset_name, mapper=CheckedMapper(mapper(cfg, False))
            )
        loader.worker_init_fn = ignore_sigterm_of_others
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """Builds the evaluator of a data set; results go to OUTPUT_DIR/inference by default."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Evaluates as Detectron2, and logs whether RPN and box heads return NaN or infinity.

        Args:
            cfg: with DATASETS.TEST.
            model: with the weights to evaluate.
            evaluators: by default those of `build_evaluator`.

        Returns:
            results by task; with several data sets by their names first.
        """
        with warn_of_non_finite_heads(model):
            return super().test(cfg, model, evaluators)

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluates with TEST.AUG or TEST.BOX_AVERAGING, on images at their original size.

        Args:
            cfg: with DATASETS.TEST.
            model: not yet wrapped for augmentation.

        Returns:
            results by task, with `_TTA` at the end of their names; their files are in
            OUTPUT_DIR/inference_TTA.
        """
        wrapped = build_model_with_tta(cfg, model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        if not cfg.TEST.SEM_SEG_AT_NETWORK_SIZE:
            # TTA resizes: an image that the loader has resized already would lose detail.
            cfg.INPUT.MIN_SIZE_TEST = 0
        cfg.freeze()
        results = cls.test(cfg, wrapped)
        return {f"{name}_TTA": value for name, value in results.items()}

    def _test_with_tta(self) -> dict[str, Any]:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results

    def build_hooks(self) -> list[HookBase | None]:
        """Returns Detectron2's hooks after ours, and the evaluation with TTA at the end."""
        # DefaultTrainer has built its checkpointer, and gives it to a hook next.
        self.checkpointer = Checkpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            allow_unmatched=self.cfg.MODEL.ALLOW_UNMATCHED_WEIGHTS,
            **self.checkpointer.checkpointables,
        )
        stock = super().build_hooks()
        if uses_tta(self.cfg):
            build_model_with_tta(self.cfg, self.model)  # fails now rather than after training
            # Before the PeriodicWriter, which only the main process has.
            at = len(stock) - int(comm.is_main_process())
            stock.insert(at, hooks.EvalHook(0, self._test_with_tta))
        # A subclass may return another loader, which cannot start at any iteration.
        exact = isinstance(self.data_loader, ResumableTrainLoader)
        monitor = OffsetMonitor(self.model, self.cfg.OFFSET_MONITOR_PERIOD)
        ours = [ExactResume() if exact else None, monitor, DivergenceReport()]
        return [*ours, *stock, StopOnSigterm()]

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the newest intact checkpoint in OUTPUT_DIR, or loads MODEL.WEIGHTS.

        Args:
            resume: whether to resume, if there is a checkpoint.

        Raises:
            ValueError: if no checkpoint is intact, or the processes find different ones.
        """
        if not resume and comm.is_main_process() and self.checkpointer.has_checkpoint():
            logging.getLogger(__name__).warning(
                "%s has checkpoints, but --resume is not set: training starts at iteration 0 and "
                "overwrites them",
                self.cfg.OUTPUT_DIR,
            )
        super().resume_or_load(resume)
        if comm.is_main_process() and 0 < self.start_iter >= self.max_iter:
            self._end_again()

    def _end_again(self) -> None:
        """Does what remains of a run that resumes at its end, where no hook sees a step."""
        file = self.checkpointer.filename
        if self.start_iter > self.max_iter:
            logging.getLogger(__name__).warning(
                "%s has been trained for %d iterations, SOLVER.MAX_ITER is %d: nothing is trained",
                *(file, self.start_iter, self.max_iter),
            )
        elif os.path.basename(file) != "model_final.pth":  # the run was killed while it wrote it
            self.checkpointer.save("model_final", iteration=self.iter)

    def train(self) -> dict[str, Any] | None:
        """Trains, and writes the results of the last evaluation to OUTPUT_DIR/results.json.

        Returns:
            these results, in the main process.

        Raises:
            FloatingPointError: if a loss or a weight is not finite.
            CheckpointWriteError: if a checkpoint cannot be written.
        """
        with without_traceback():
            super().train()
        results = getattr(self, "_last_eval_results", None)
        if results is not None:  # it may be empty, such as on COCO's test-dev
            write_results(self.cfg, results)
        return results

    def after_train(self) -> None:
        """Runs the hooks, after an error in the last step without Detectron2's `EvalHook`s."""
        if self.iter < self.max_iter:
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, hooks.EvalHook)]
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of Detectron2's main, which has the optimizer's."""
        return {**super().state_dict(), INNER_TRAINER: self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state in checkpoints of this trainer and of Detectron2's.

        Those of Detectron2 0.6 lack the optimizer's state. With Detectron2's `LRMultiplier`,
        learning rates stay those of the config.

        Args:
            state_dict: a trainer's state.
        """
        if "seed" in state_dict:  # of dcn_plugin 0.1
            state = {"ExactResume": {"seed": state_dict["seed"]}}
            state_dict = {**state_dict, "hooks": {**state_dict.get("hooks", {}), **state}}
        if INNER_TRAINER in state_dict:
            check_state(self.optimizer, state_dict[INNER_TRAINER]["optimizer"], self.model)
        rates = [group.get("initial_lr") for group in self.optimizer.param_groups]
        # Not DefaultTrainer's, which on Detectron2's main needs the state that 0.6 does not save.
        TrainerBase.load_state_dict(self, state_dict)
        if INNER_TRAINER in state_dict:
            inner = state_dict[INNER_TRAINER]
            if isinstance(self._trainer, AMPTrainer) and "grad_scaler" not in inner:
                # Of a run without SOLVER.AMP.
                inner = {**inner, "grad_scaler": self._trainer.grad_scaler.state_dict()}
            self._trainer.load_state_dict(inner)
            match_memory_format(self.optimizer)
        # Other schedulers may compute learning rates from the last ones, which are loaded.
        # Beyond MAX_ITER, where nothing is trained, there are no rates.
        if isinstance(self.scheduler, LRMultiplier) and self.iter < self.max_iter:
            self.scheduler.base_lrs = rates
            now = self.scheduler.get_lr()
            for group, rate, lr in zip(self.optimizer.param_groups, rates, now, strict=True):
                group["initial_lr"], group["lr"] = rate, lr


def uses_tta(cfg: CfgNode) -> bool:
    """Returns whether the config asks for test-time augmentation or box averaging."""
    return cfg.TEST.AUG.ENABLED or cfg.TEST.BOX_AVERAGING.ENABLED


def write_results(cfg: CfgNode, results: dict[str, Any]) -> None:
    """Writes the results of an evaluation to OUTPUT_DIR/results.json, in the main process.

    Args:
        cfg: with OUTPUT_DIR.
        results: by task, or by data set and task.
    """
    if comm.is_main_process():
        # JSON has no NaN, such as AP of small objects where there are none: null.
        valid = json.loads(json.dumps(results, default=float), parse_constant=lambda name: None)
        with PathManager.open(os.path.join(cfg.OUTPUT_DIR, "results.json"), "w") as file:
            file.write(json.dumps(valid, indent=2) + "\n")
