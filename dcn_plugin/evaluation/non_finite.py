# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Predictions with NaN or infinity, which would have any rank among the others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class DropNonFinite(DatasetEvaluator):
    """Mixin for an evaluator: drops detections and proposals with a NaN or an infinity.

    The number of those that were dropped is logged as a warning.

    Attributes:
        dropped (int): number in this process since `reset`.
    """

    dropped = 0
    dropped_name = "detections"

    def reset(self) -> None:
        """Prepares for an evaluation."""
        super().reset()
        self.dropped = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Adds the finite predictions of a batch; arguments as in Detectron2."""
        super().process(inputs, [self._drop(output) for output in outputs])

    def _drop(self, output: dict[str, Any]) -> dict[str, Any]:
        output = dict(output)
        for name in ("instances", "proposals"):
            if name in output:
                keep = is_finite(output[name])
                if not keep.all():
                    self.dropped += int((~keep).sum())
                    output[name] = output[name][keep]
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Logs how many were dropped, and returns the results."""
        self.log_dropped()
        return super().evaluate(*args, **kwargs)

    def log_dropped(self) -> None:
        """Logs how many predictions all processes have dropped."""
        if getattr(self, "_distributed", True):
            counts = comm.gather(self.dropped)
        else:
            counts = [self.dropped]
        if sum(counts) > 0:
            logger.warning(
                "Dropped %d %s with NaN or infinity: the model has diverged, or overflows float16",
                sum(counts),
                self.dropped_name,
            )


def is_finite(instances: Instances) -> Tensor:
    """Returns which instances have only finite values in all their fields.

    Args:
        instances: N predictions.

    Returns:
        a tensor of N bools.
    """
    keep = torch.ones(len(instances), dtype=torch.bool)
    for value in instances.get_fields().values():
        value = getattr(value, "tensor", value)  # of boxes
        if isinstance(value, Tensor) and value.is_floating_point():
            keep &= value.isfinite().unsqueeze(-1).flatten(1).all(dim=1).cpu()
    return keep


@contextmanager
def warn_of_non_finite_heads(model: nn.Module) -> Iterator[None]:
    """Logs how often RPN and box heads return NaN or infinity.

    Detectron2 drops their proposals and detections before an evaluator sees them. All processes of
    a distributed evaluation must leave the context.

    Args:
        model: to evaluate.
    """
    rpn_heads = {module.rpn_head for module in model.modules() if isinstance(module, RPN)}
    heads = {
        name: module
        for name, module in model.named_modules()
        if module in rpn_heads or isinstance(module, FastRCNNOutputLayers)
    }
    wrong: dict[str, Tensor] = {}  # on the device: no synchronization for each image

    def count(name: str, head: nn.Module, args: object, output: Any) -> None:
        tensors = [t for part in output for t in (part if isinstance(part, list) else [part])]
        is_wrong = torch.stack([~tensor.isfinite().all() for tensor in tensors]).any().int()
        wrong[name] = wrong.get(name, 0) + is_wrong

    handles = [head.register_forward_hook(partial(count, name)) for name, head in heads.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    counts = comm.gather({name: int(number) for name, number in wrong.items()})
    for name, number in sum(map(Counter, counts), Counter()).items():
        logger.warning(
            "%s returned NaN or infinity in %d batches, and Detectron2 drops what it predicts "
            "there: the model has diverged, or overflows float16",
            name,
            number,
        )
