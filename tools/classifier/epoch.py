# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""One pass over the images: to learn, or to count what is right."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

CHECK = 100  # steps from one look at the loss to the next, since a look waits for the GPU


class Runner:
    """Runs a classifier of Detectron2's kind, whose logits are named `linear`."""

    def __init__(self, model: nn.Module, device: torch.device, amp: bool, quiet: bool) -> None:
        """Keeps what every pass needs.

        Args:
            model: wrapped for several processes, or not.
            device: of the model.
            amp: whether to compute in bfloat16 where PyTorch's autocast does.
            quiet: whether to leave out the progress bar.
        """
        self.model = model
        self.device = device
        self.amp = amp
        self.quiet = quiet
        self.sums = torch.zeros(3, device=device, dtype=torch.float64)

    def logits(self, images: Tensor) -> Tensor:
        """Returns Tensor[N, classes] of images."""
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(images)["linear"].float()

    def train(self, loader: DataLoader, optimizer: torch.optim.Optimizer, title: str) -> float:
        """Learns from every batch once.

        Args:
            loader: of images and labels.
            optimizer: of the model.
            title: of the progress bar.

        Returns:
            the mean loss.

        Raises:
            FloatingPointError: if the loss is no number.
        """
        self.model.train()
        self.sums.zero_()
        total = self.sums[:2]  # of the losses, and their number
        for step, (images, labels) in enumerate(tqdm(loader, title, disable=self.quiet), start=1):
            loss = F.cross_entropy(self.logits(images), labels.to(self.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += torch.stack([loss.detach(), torch.ones_like(loss)])
            if step % CHECK == 0 or step == len(loader):
                check(float(total[0]))
        self.add_up()
        return float(total[0] / total[1])

    @torch.no_grad()
    def validate(self, loader: DataLoader, title: str) -> dict[str, float]:
        """Counts how often the right class is the first, and among the first five.

        Args:
            loader: of images and labels.
            title: of the progress bar.

        Returns:
            percentages `top1` and `top5`, and the number of images.
        """
        self.model.eval()
        if dist.is_initialized():  # each process has seen other images: those of the first count
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        total = self.sums.zero_()
        for images, labels in tqdm(loader, title, disable=self.quiet):
            found = self.logits(images)
            best = found.topk(min(5, found.shape[1]), dim=1).indices
            hits = best == labels.to(self.device)[:, None]
            total += torch.stack([hits[:, 0].sum(), hits.sum(), torch.ones_like(hits[:, 0]).sum()])
        self.add_up()
        first, five, images = total.tolist()
        return {"top1": 100 * first / images, "top5": 100 * five / images, "images": int(images)}

    def add_up(self) -> None:
        """Adds the sums of all processes."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)


def check(loss: float) -> None:
    """Stops what cannot be mended any more."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss}: a lower --lr may help")
