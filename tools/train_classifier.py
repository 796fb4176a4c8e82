#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains Aligned-Inception-ResNet as a classifier, since its weights were never published.

    python tools/train_classifier.py --data path/to/imagenet --output output/air
    torchrun --nproc_per_node 8 tools/train_classifier.py --data … --output …

The data is any folder with train/<class>/ and val/<class>/. The recipe is that of the ResNet paper:
SGD with 256 images a step, learning rate 0.1, a tenth of it three times. Images have the channel
order and the mean of Detectron2's default config: output/air/model_final.pth is a MODEL.WEIGHTS for
`build_aligned_inception_resnet_backbone` as it is. After an interruption add --resume.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from classifier.epoch import Runner
from classifier.images import Share, batches, open_folders, training_view, validation_view
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils import comm

from dcn_plugin.engine.processes import (
    join_torchrun,
    leave_processes,
    stop_with,
    under_torchrun,
)
from dcn_plugin.files import atomic_write
from dcn_plugin.modeling import AlignedInceptionResNet

CHECKPOINT, FINAL, METRICS = "checkpoint.pth", "model_final.pth", "metrics.json"
NETWORK = ("stem_channels", "res2_channels", "blocks", "deform_last")  # arguments that shape it


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/<class>/ and val/<class>/")
    add("--output", type=Path, required=True, help="folder for checkpoints and metrics.json")
    add("--resume", action="store_true", help="go on after the last epoch in --output")
    add("--eval-only", action="store_true", help="validate the checkpoint in --output")
    add("--epochs", type=int, default=120)
    add("--batch-size", type=int, default=256, help="of all processes together")
    add("--lr", type=float, default=0.1)
    add("--milestones", type=int, nargs="*", default=[30, 60, 90], help="epochs: a tenth of --lr")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--train-size", type=int, nargs=2, default=[256, 480], help="shorter side, least and most")
    add("--test-size", type=int, default=256, help="shorter side")
    add("--crop", type=int, default=224)
    add("--deform-last", type=int, nargs=4, default=[0, 0, 0, 0], help="as DEFORM_LAST")
    add("--blocks", type=int, nargs=4, default=[3, 4, 23, 3], help="of each stage")
    add("--stem-channels", type=int, default=64)
    add("--res2-channels", type=int, default=256)
    add("--amp", action="store_true", help="compute in bfloat16")
    add("--workers", type=int, default=4, help="processes that read images, for each GPU")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


class Training:
    """A classifier, its optimizer, and the epochs that are done."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Checks the command line, opens the data and makes the network."""
        self.args = args
        check_output(args)
        least, most = args.train_size
        if not 1 <= least <= most:
            raise ValueError(f"--train-size must be the least and the most, got {least} {most}")
        train, val = open_folders(args.data)
        if under_torchrun():
            join_torchrun("nccl" if args.device == "cuda" else "gloo")
        self.rank, self.processes = comm.get_rank(), comm.get_world_size()
        self.device = torch.device(args.device)  # of GPUs the one that torchrun's process chose
        if args.batch_size % self.processes or args.batch_size // self.processes < 1:
            raise ValueError(
                f"--batch-size must be a multiple of the {self.processes} processes, "
                f"got {args.batch_size}"
            )
        if len(train) < args.batch_size:
            raise ValueError(
                f"--batch-size must be at most the {len(train)} images of {args.data / 'train'}, "
                f"got {args.batch_size}"
            )
        self.model = make_model(args, len(train.classes)).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=args.lr,
            momentum=args.momentum,
            weight_decay=args.weight_decay,
        )
        self.epoch = 0
        self.classes = train.classes
        batch = args.batch_size // self.processes
        self.share = Share(len(train), self.rank, self.processes, args.seed)
        everything = Share(len(val), self.rank, self.processes, None)
        view = training_view(args.train_size, args.crop)
        self.train = batches(train, view, self.share, batch, args.workers)
        view = validation_view(args.test_size, args.crop)
        self.val = batches(val, view, everything, batch, args.workers)
        if args.resume or args.eval_only:
            self.load()
        wrapped: nn.Module = self.model
        if self.processes > 1:
            wrapped = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.runner = Runner(wrapped, self.device, args.amp, quiet=self.rank > 0)

    def run(self) -> None:
        """Trains the epochs that are left, validates and saves after each."""
        while self.epoch < self.args.epochs:
            start = time.monotonic()
            lr = self.args.lr * 0.1 ** sum(self.epoch >= m for m in self.args.milestones)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.share.epoch = self.epoch
            # A resumed training augments as one that was never interrupted.
            torch.manual_seed((self.args.seed + self.epoch) * self.processes + self.rank)
            title = f"epoch {self.epoch + 1}/{self.args.epochs}"
            loss = self.runner.train(self.train, self.optimizer, title)
            found = self.runner.validate(self.val, "validation")
            self.epoch += 1
            self.save({"epoch": self.epoch, "lr": lr, "loss": loss, **found}, start)

    def save(self, metrics: dict[str, Any], start: float) -> None:
        """Writes the metrics, what a resumed training needs, and what Detectron2 loads."""
        if self.rank > 0:
            return
        metrics["seconds"] = round(time.monotonic() - start, 1)
        folder = self.args.output
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            **self.described(),
        }
        with atomic_write(folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
        with (folder / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        # Detectron2 then finds the place of each weight by the end of its name.
        weights = {"model": state["model"], "matching_heuristics": True, "__author__": "dcn_plugin"}
        with atomic_write(folder / FINAL) as temporary:
            torch.save({**weights, "classes": self.classes}, temporary)
        left = (self.args.epochs - self.epoch) * metrics["seconds"] / 3600
        print(
            f"epoch {self.epoch}: loss {metrics['loss']:.3f}, top-1 {metrics['top1']:.2f} %, "
            f"top-5 {metrics['top5']:.2f} %, {left:.1f} hours left",
            flush=True,
        )

    def described(self) -> dict[str, Any]:
        """Returns what a checkpoint must agree in with the command line and the data."""
        return {"classes": self.classes, **{name: getattr(self.args, name) for name in NETWORK}}

    def load(self) -> None:
        """Reads the last checkpoint, if it is one of this network."""
        path = self.args.output / CHECKPOINT
        state = read(path)
        for name, ours in self.described().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"{path} has other {name.replace('_', '-')}: {state.get(name)}, got {ours}"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def make_model(args: argparse.Namespace, classes: int) -> AlignedInceptionResNet:
    """Makes the network, the same in every process."""
    torch.manual_seed(args.seed)
    model = AlignedInceptionResNet(
        num_classes=classes,
        stem_channels=args.stem_channels,
        res2_channels=args.res2_channels,
        blocks=args.blocks,
        deform_last=args.deform_last,
    )
    return model.to(memory_format=torch.channels_last)


def check_output(args: argparse.Namespace) -> None:
    """Stops before hours of training would be lost, or found missing."""
    path = args.output / CHECKPOINT
    if (args.resume or args.eval_only) and not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train first, without --resume")
    if path.is_file() and not (args.resume or args.eval_only):
        raise FileExistsError(f"{path} is there: add --resume, or name another --output")


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a file leads an unpickler to anything
        raise ValueError(f"{path} cannot be read: {type(error).__name__}, {error}") from error


def main(words: list[str] | None = None) -> None:
    """Trains, or validates."""
    try:
        training = Training(parse_arguments(words))
    except (OSError, ValueError) as error:
        stop_with(f"train_classifier: {error}")
    try:
        if training.args.eval_only:
            found = training.runner.validate(training.val, "validation")
            if training.rank == 0:
                print(json.dumps(found))
        else:
            training.run()
    except FloatingPointError as error:
        sys.exit(f"train_classifier: {error}")
    leave_processes()


if __name__ == "__main__":
    main()
