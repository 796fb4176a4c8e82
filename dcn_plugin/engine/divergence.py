# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is known when a loss is not finite, instead of a traceback."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import HookBase
from detectron2.utils import comm

from dcn_plugin.messages import UserError

from .offset_monitor import OffsetMonitor

# Errors of training whose message says all.
EXPECTED = (FloatingPointError, UserError)
LAYERS = 8  # whose offsets are listed


class DivergenceReport(HookBase):
    """Describes the iteration in Detectron2's FloatingPointError, which stops training.

    Its message becomes a block with iteration, losses, learning rates, offsets and images of the
    batch. Each process whose own losses are not finite reports its own batch: the main process in
    the log, the others on standard error too. Until then a process keeps the batch of the current
    step, and reads its losses where Detectron2 has read them, so that it waits for the GPU no more
    often.
    """

    _batch: Any = None
    _losses: Mapping[str, Tensor] | None = None

    def before_train(self) -> None:
        self._inner = getattr(self.trainer, "_trainer", self.trainer)
        self._inner.run_step = partial(self._run_step, self._inner.run_step)
        self._inner._write_metrics = partial(self._write_metrics, self._inner._write_metrics)
        self._handle = self.trainer.model.register_forward_pre_hook(self._keep_batch)

    def after_train(self) -> None:
        del self._inner.run_step, self._inner._write_metrics  # the methods of its class
        self._handle.remove()

    def _keep_batch(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        if model.training:
            self._batch = inputs[0]

    def _run_step(self, run_step: Callable[[], None]) -> None:
        try:
            run_step()
        except FloatingPointError as error:  # of the losses, or of Detectron2's RPN
            report = self._report(error)
            if not comm.is_main_process():  # its log is a file only
                print(report, file=sys.stderr, flush=True)
            raise FloatingPointError(report) from error
        finally:
            self._batch = self._losses = None

    def _write_metrics(
        self, write: Callable[..., None], losses: Mapping[str, Tensor], *args: Any, **options: Any
    ) -> None:
        self._losses = losses
        write(losses, *args, **options)
        period = getattr(self._inner, "gather_metric_period", 1)  # of Detectron2's main
        if comm.is_main_process() or (self.trainer.iter + 1) % period != 0:
            return
        if not all(math.isfinite(value) for value in losses.values()):
            raise FloatingPointError("Loss became infinite or NaN")

    def _report(self, error: FloatingPointError) -> str:
        where = f"process {comm.get_rank()} of {comm.get_world_size()}"
        lines = [f"Training diverged at iteration {self.trainer.iter}, in {where}"]
        losses = {name: float(value) for name, value in (self._losses or {}).items()}
        if losses:
            lines.append(f"losses: {', '.join(f'{k} {v:.4g}' for k, v in losses.items())}")
        if not losses or all(map(math.isfinite, losses.values())):
            lines.append(" ".join(str(error).split()))
        if losses and all(map(math.isfinite, losses.values())):
            lines.append("the process whose losses are not finite reports its own images")
        rates = sorted({group["lr"] for group in self.trainer.optimizer.param_groups})
        lines.append(f"learning rate: {', '.join(f'{rate:.4g}' for rate in rates)}")
        lines += self._offsets()
        if images := names_of_images(self._batch):
            lines.append(f"images: {', '.join(images)}")
        checkpointer = getattr(self.trainer, "checkpointer", None)
        if checkpointer is not None:
            last = checkpointer.get_checkpoint_file() or "none"
            lines.append(f"last checkpoint, for --resume: {last}")
        lines.append(
            "A lower SOLVER.BASE_LR or OFFSET_LR_FACTOR, a longer warmup, or SOLVER.CLIP_GRADIENTS "
            "may help"
        )
        return "\n  ".join(lines)

    def _offsets(self) -> list[str]:
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        monitor = OffsetMonitor(model, 0)
        if not monitor.branches or self._batch is None:
            return []
        problem = ""
        monitor.start()
        try:
            with torch.no_grad():
                model(self._batch)
        except Exception as error:  # as the RPN's for NaN: the layers before have been measured
            problem = f", of the layers before {type(error).__name__}"
        rows = monitor.stop()
        # NaN first, then the largest.
        worst = sorted(rows, key=lambda name: (math.isfinite(rows[name][0]), -rows[name][0]))
        lines = [f"offsets of this batch in pixels{problem}:"]
        for name in worst[:LAYERS]:
            mean, outside, _, maximum, side = rows[name]
            lines.append(
                f"  {name}: mean {mean:.4g}, maximum {maximum:.4g} on a map of side {side:.0f}, "
                f"{outside:.0%} of the taps outside"
            )
        if len(worst) > LAYERS:
            lines.append(f"  and {len(worst) - LAYERS} layers with smaller ones")
        return lines


def names_of_images(batch: Any) -> list[str]:
    """Returns image_id and file_name of each image of a batch of Detectron2's dataset dicts."""
    records = [record for record in batch or () if isinstance(record, Mapping)]
    return [
        " ".join(str(record[key]) for key in ("image_id", "file_name") if key in record)
        for record in records
    ]


@contextmanager
def without_traceback() -> Iterator[None]:
    """Makes Detectron2's trainers log the message alone of errors that need no traceback."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, EXPECTED):
            return True
        record.msg, record.args, record.exc_info = str(error), (), None
        return record.funcName == "train"  # in `_write_metrics` main logs it before

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(shorten)
    try:
        yield
    except OSError as error:
        # A full disk refuses the last metrics too.
        if isinstance(error.__context__, EXPECTED):
            raise error.__context__ from None
        raise
    finally:
        logger.removeFilter(shorten)
