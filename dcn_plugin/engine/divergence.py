# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is known when a loss is not finite, instead of a traceback."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import HookBase
from detectron2.utils import comm

from dcn_plugin.messages import UserError, one_line

from .offset_monitor import OffsetMonitor

# Errors of training whose message says all.
EXPECTED = (FloatingPointError, UserError)
LAYERS = 8  # whose offsets are listed


class DivergenceReport(HookBase):
    """Describes the iteration in Detectron2's FloatingPointError, which stops training.

    So does that of weights that `Checkpointer` does not save. Its message becomes a block with
    iteration, losses, learning rates, offsets and images of the batch, as far as the trainer has
    them. The offsets need another forward pass, which a single process alone runs: of several,
    those whose losses are finite would not join its collectives, such as SyncBN's. Each process
    whose own losses are not finite reports its own batch: the main process in the log, the others
    on standard error too. Until then a process keeps the batch of the current step, and reads its
    losses where Detectron2 has read them, so that it waits for the GPU no more often.
    """

    _inner: Any = None
    _handle: Any = None
    _call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # arguments of the model
    _losses: Mapping[str, Any] | None = None

    def before_train(self) -> None:
        self._inner = getattr(self.trainer, "_trainer", self.trainer)
        self._inner.run_step = partial(self._run_step, self._inner.run_step)
        # Where a Checkpointer finds weights that are not finite.
        self.trainer.after_step = partial(self._after_step, self.trainer.after_step)
        if hasattr(self._inner, "_write_metrics"):
            self._inner._write_metrics = partial(self._write_metrics, self._inner._write_metrics)
        model = getattr(self.trainer, "model", None)
        if model is not None:
            self._handle = model.register_forward_pre_hook(self._keep_call, with_kwargs=True)

    def after_train(self) -> None:
        if self._inner is None:  # the before_train of another hook has failed
            return
        for name in ("run_step", "_write_metrics"):
            vars(self._inner).pop(name, None)  # the method of its class
        vars(self.trainer).pop("after_step", None)
        if self._handle is not None:
            self._handle.remove()

    def _keep_call(
        self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if model.training:
            self._call = inputs, options

    def _run_step(self, run_step: Callable[[], None]) -> None:
        self._call = None
        try:
            with self._reporting():  # of the losses, or of Detectron2's RPN
                run_step()
        finally:
            self._losses = None

    def _after_step(self, after_step: Callable[[], None]) -> None:
        with self._reporting():
            after_step()
        self._call = None

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except FloatingPointError as error:
            report = self._report(error)
            self._call = None
            if not comm.is_main_process():  # its log is a file only
                print(report, file=sys.stderr, flush=True)
            raise FloatingPointError(report) from error

    def _write_metrics(
        self, write: Callable[..., None], losses: Mapping[str, Tensor], *args: Any, **options: Any
    ) -> None:
        self._losses = losses
        write(losses, *args, **options)
        period = getattr(self._inner, "gather_metric_period", 1)  # of Detectron2's main
        if comm.is_main_process() or (self.trainer.iter + 1) % period != 0:
            return
        if not all(map(math.isfinite, scalars(losses).values())):
            raise FloatingPointError("Loss became infinite or NaN")

    def _report(self, error: FloatingPointError) -> str:
        where = f"process {comm.get_rank()} of {comm.get_world_size()}"
        lines = [f"Training diverged at iteration {self.trainer.iter}, in {where}"]
        losses = scalars(self._losses or {})
        if losses:
            lines.append(f"losses: {', '.join(f'{k} {v:.4g}' for k, v in losses.items())}")
        if all(map(math.isfinite, losses.values())):
            lines.append(one_line(error))
            if losses:
                lines.append("the process whose losses are not finite reports its own images")
        if optimizer := getattr(self.trainer, "optimizer", None):
            rates = sorted({group["lr"] for group in optimizer.param_groups})
            lines.append(f"learning rate: {', '.join(f'{rate:.4g}' for rate in rates)}")
        inputs, options = self._call or ((), {})
        lines += self._offsets(inputs, options)
        if images := names_of_images([*inputs, *options.values()]):
            lines.append(f"images: {', '.join(images)}")
        if checkpointer := getattr(self.trainer, "checkpointer", None):
            try:
                last = checkpointer.get_checkpoint_file() or "none"
            except UserError as wrong:  # in last_checkpoint
                last = f"none, {one_line(wrong)}"
            lines.append(f"last checkpoint, for --resume: {last}")
        lines.append(
            "A lower SOLVER.BASE_LR or OFFSET_LR_FACTOR, a longer warmup, or SOLVER.CLIP_GRADIENTS "
            "may help"
        )
        return "\n  ".join(lines)

    def _offsets(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> list[str]:
        if self._call is None:
            return []
        model = self.trainer.model
        monitor = OffsetMonitor(model, 0)
        if not monitor.branches:
            return []
        if comm.get_world_size() > 1:
            return [
                "offsets: not measured with several processes; OFFSET_MONITOR_PERIOD 1 logs them"
            ]
        model = model.module if isinstance(model, DistributedDataParallel) else model
        problem = ""
        monitor.start()
        try:
            with torch.no_grad():
                model(*inputs, **options)
        except Exception as error:  # as the RPN's for NaN: the layers before have been measured
            problem = f" (the forward pass failed with {type(error).__name__}; layers before it)"
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


def scalars(losses: Mapping[str, Any]) -> dict[str, float]:
    """Returns the losses that are numbers or tensors of one element."""
    tensors = {name: torch.as_tensor(value).detach() for name, value in losses.items()}
    return {name: float(value) for name, value in tensors.items() if value.numel() == 1}


def names_of_images(batches: Iterable[Any]) -> list[str]:
    """Returns image_id and file_name of each image of batches of Detectron2's dataset dicts."""
    batches = [batch for batch in batches if isinstance(batch, Sequence)]
    records = [record for batch in batches for record in batch if isinstance(record, Mapping)]
    return [
        " ".join(str(record[key]) for key in ("image_id", "file_name") if key in record)
        for record in records
    ]


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and those during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


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
    except (OSError, RuntimeError) as error:
        # A full disk refuses the last metrics too, and the RuntimeError of torch.save hides it.
        for context in contexts(error):
            if isinstance(context, EXPECTED):
                raise context from None
        raise
    finally:
        logger.removeFilter(shorten)
