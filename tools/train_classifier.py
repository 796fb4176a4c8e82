#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains Aligned-Inception-ResNet as a classifier, since its weights were never published.

    python tools/train_classifier.py --data path/to/imagenet --output output/air
    torchrun --nproc_per_node 8 tools/train_classifier.py --data … --output …

--data is any folder with train/<class>/ and val/<class>/. The recipe is that of the ResNet paper:
SGD with 256 images per step and a learning rate of 0.1, which is divided by ten three times. Images
have the channel order and the mean of Detectron2's default config: output/air/model_final.pth can
be used as MODEL.WEIGHTS of `build_aligned_inception_resnet_backbone`. To continue an interrupted
run, add --resume.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from detectron2.data.samplers import InferenceSampler
from detectron2.engine import SimpleTrainer, default_writers, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.common.param_scheduler import MultiStepParamScheduler

from dcn_plugin.engine import Checkpointer, lock_output_dir
from dcn_plugin.engine.checkpoint_files import checkpoint_names
from dcn_plugin.engine.config_checks import check_device
from dcn_plugin.engine.divergence import without_traceback
from dcn_plugin.engine.launch import join_torchrun
from dcn_plugin.files import output_folder
from dcn_plugin.messages import MissingFileError, UserError, exit_on_error
from dcn_plugin.modeling import AlignedInceptionResNet

# Detectron2's MODEL.PIXEL_MEAN: blue, green, red; its MODEL.PIXEL_STD is 1.
PIXEL_MEAN = (103.530, 116.280, 123.675)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train/<class>/ and val/<class>/")
    add(
        "--output",
        type=output_folder,
        required=True,
        help="folder of checkpoints and metrics",
    )
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--eval-only", action="store_true", help="evaluate the last checkpoint in --output")
    add("--epochs", type=int, default=120)
    add("--batch-size", type=int, default=256, help="of all processes together")
    add("--lr", type=float, default=0.1)
    add("--milestones", type=int, nargs="*", default=[30, 60, 90], help="epochs that divide --lr")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--train-size", type=int, nargs=2, default=[256, 480], help="shorter side, min and max")
    add("--test-size", type=int, default=256, help="shorter side")
    add("--crop", type=int, default=224)
    add("--deform-last", type=int, nargs=4, default=[0, 0, 0, 0], help="as DEFORM_LAST")
    add("--blocks", type=int, nargs=4, default=[3, 4, 23, 3], help="of each stage")
    add("--stem-channels", type=int, default=64)
    add("--res2-channels", type=int, default=256)
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--workers", type=int, default=4, help="data loading processes per GPU")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(words)


def training_transform(short_side: Sequence[int], crop: int) -> v2.Compose:
    """Returns the augmentation of the ResNet paper: scale, crop and flip.

    Args:
        short_side: minimum and maximum in pixels to which the shorter side is scaled.
        crop: side of the randomly placed square crop.
    """
    resize = v2.RandomResize(short_side[0], short_side[1] + 1, antialias=True)
    crop_and_flip = [v2.RandomCrop(crop, pad_if_needed=True), v2.RandomHorizontalFlip()]
    return v2.Compose([resize, *crop_and_flip, v2.PILToTensor(), to_detectron2])


def validation_transform(short_side: int, crop: int) -> v2.Compose:
    """Returns the center crop of each image."""
    resize = v2.Resize(short_side, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(crop), v2.PILToTensor(), to_detectron2])


def to_detectron2(image: Tensor) -> Tensor:
    """Converts an RGB image of bytes to what Detectron2's models feed their backbone by default."""
    return image.flip(0).float() - torch.tensor(PIXEL_MEAN)[:, None, None]


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for numbers with which nothing can be trained."""
    rules: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("epochs crop test_size stem_channels res2_channels", "above 0", lambda n: n > 0),
        ("workers", "0 or more", lambda n: n >= 0),
        ("lr momentum weight_decay", "a finite number, 0 or more", lambda x: 0 <= x < math.inf),
        ("milestones", "ascending epochs above 0", lambda m: [0, *m] == sorted({0, *m})),
        ("train_size", "minimum and maximum", lambda sizes: 1 <= sizes[0] <= sizes[1]),
    ]
    for names, must, holds in rules:
        for name in names.split():
            if not holds(value := getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} must be {must}, got {value}")


def load_image(path: str) -> Image.Image:
    """Reads an image as torchvision does; the error names the file."""
    try:
        return default_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # of PIL on damaged files
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def open_data(args: argparse.Namespace) -> tuple[ImageFolder, ImageFolder]:
    """Opens the folders train/ and val/, and checks that they fit the command line."""
    train, val = args.data / "train", args.data / "val"
    try:
        train_data = ImageFolder(
            train, training_transform(args.train_size, args.crop), loader=load_image
        )
        val_data = ImageFolder(
            val, validation_transform(args.test_size, args.crop), loader=load_image
        )
    except FileNotFoundError as error:  # also if there are no classes
        raise MissingFileError(f"--data must have {train}/<class>/ and val/: {error}") from error
    if train_data.classes != val_data.classes:
        different = sorted(set(train_data.classes) ^ set(val_data.classes))
        raise UserError(
            f"{args.data}/train and {args.data}/val must have the same classes, only one has "
            f"{', '.join(different[:5])}"
        )
    processes = comm.get_world_size()
    if not processes <= args.batch_size <= len(train_data) or args.batch_size % processes:
        raise UserError(
            f"--batch-size must be a multiple of the {processes} processes and at most the "
            f"{len(train_data)} images of {args.data / 'train'}, got {args.batch_size}"
        )
    return train_data, val_data


class EpochLoader:
    """Repeats a loader forever, with the random numbers of each epoch seeded.

    A resumed run therefore sees the same images, augmented in the same way.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        """Starts with epoch 0, unless `epoch` is set before the first batch is taken."""
        self.loader = loader
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[list[Tensor]]:
        """Yields the batches of all epochs."""
        while True:
            self.loader.sampler.set_epoch(self.epoch)
            torch.manual_seed((self.seed + self.epoch) * comm.get_world_size() + comm.get_rank())
            yield from self.loader
            self.epoch += 1


class Classifier(nn.Module):
    """Computes the loss in training and the logits in evaluation, as Detectron2's trainer wants."""

    def __init__(self, backbone: nn.Module, device: torch.device, amp: bool) -> None:
        """Wraps a backbone with a linear classifier."""
        super().__init__()
        self.backbone = backbone
        self.device = device
        self.amp = amp

    def forward(self, batch: list[Tensor]) -> dict[str, Tensor] | Tensor:
        """Takes images and labels."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.backbone(images)["linear"].float()
        return {"loss": F.cross_entropy(logits, labels)} if self.training else logits


class AccuracyEvaluator(DatasetEvaluator):
    """Computes top-1 and top-5 accuracy in percent."""

    def reset(self) -> None:
        """Starts a new evaluation."""
        self.counts = torch.zeros(3, dtype=torch.int64)

    def process(self, inputs: list[Tensor], outputs: Tensor) -> None:
        """Counts the correct predictions of a batch."""
        top = outputs.cpu().topk(min(5, outputs.shape[1]), dim=1).indices
        hits = top == inputs[1][:, None]
        self.counts += torch.tensor([hits[:, 0].sum(), hits.sum(), len(hits)])

    def evaluate(self) -> dict[str, float]:
        """Returns the accuracies over the images of all processes."""
        top1, top5, images = sum(comm.all_gather(self.counts)).tolist()
        return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}


class ClassifierCheckpointer(Checkpointer):
    """Saves checkpoints that are weights for a backbone, and resumes only the same network."""

    def __init__(self, *args: Any, network: dict[str, Any], **kwargs: Any) -> None:
        """Takes, beside Detectron2's arguments, what a checkpoint must agree in."""
        super().__init__(*args, **kwargs)
        self.network = network

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves; with `matching_heuristics` Detectron2 matches parameters by suffix."""
        super().save(name, matching_heuristics=True, network=self.network, **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        for name, expected in self.network.items():
            saved = checkpoint.get("network", {}).get(name)
            if saved != expected:
                raise UserError(f"{self.filename} was saved with {name} {saved}, got {expected}")
        return super()._load_model(checkpoint)


class ClassifierTrainer(SimpleTrainer):
    """Detectron2's trainer with the data, the schedule and the hooks of the classifier."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Builds everything; ValueError or OSError if the arguments do not fit."""
        train_data, val_data = open_data(args)
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)  # the same weights in every process
        shape = {name: getattr(args, name) for name in ("stem_channels", "res2_channels", "blocks")}
        backbone = AlignedInceptionResNet(
            num_classes=len(train_data.classes), deform_last=args.deform_last, **shape
        )
        backbone = backbone.to(self.device, memory_format=torch.channels_last)
        model: nn.Module = Classifier(backbone, self.device, args.amp)
        if comm.get_world_size() > 1:
            model = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(
            backbone.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
        )
        options = {"num_workers": args.workers, "pin_memory": self.device.type == "cuda"}
        batch = args.batch_size // comm.get_world_size()
        sampler = DistributedSampler(
            train_data, comm.get_world_size(), comm.get_rank(), seed=args.seed, drop_last=True
        )
        loader = DataLoader(train_data, batch, sampler=sampler, drop_last=True, **options)
        val_sampler = InferenceSampler(len(val_data))
        self.val_loader = DataLoader(val_data, batch, sampler=val_sampler, **options)
        super().__init__(model, EpochLoader(loader, args.seed), optimizer)
        self.backbone = backbone

        steps = len(loader)
        self.max_iter = args.epochs * steps
        network = {"classes": train_data.classes, "deform_last": args.deform_last, **shape}
        args.output.mkdir(parents=True, exist_ok=True)
        self.checkpointer = ClassifierCheckpointer(
            backbone, str(args.output), network=network, trainer=self
        )
        milestones = [epoch * steps for epoch in args.milestones if epoch < args.epochs]
        factors = [0.1**i for i in range(len(milestones) + 1)]
        schedule = MultiStepParamScheduler(factors, self.max_iter, milestones)
        self.register_hooks(
            [
                hooks.IterationTimer(),
                hooks.LRScheduler(optimizer, schedule),
                hooks.EvalHook(steps, self.evaluate),
            ]
        )
        if comm.is_main_process():  # another one might read last_checkpoint while it is written
            checkpoints = hooks.PeriodicCheckpointer(self.checkpointer, steps, max_to_keep=1)
            writers = default_writers(str(args.output), self.max_iter)
            writer = hooks.PeriodicWriter(writers, period=min(100, steps))
            self.register_hooks([checkpoints, writer])

    def resume(self) -> None:
        """Loads the last checkpoint, which is that of an epoch."""
        self.checkpointer.resume_or_load("")
        self.start_iter = self.iter + 1
        self.data_loader.epoch = self.start_iter // len(self.data_loader.loader)

    def evaluate(self) -> dict[str, float]:
        """Evaluates on val/; every process takes the batch statistics of the first."""
        if dist.is_initialized():
            for buffer in self.backbone.buffers():
                dist.broadcast(buffer, 0)
        return inference_on_dataset(self.model, self.val_loader, AccuracyEvaluator())


def check_output(args: argparse.Namespace) -> None:
    """Checks --output before anything is computed."""
    there = (args.output / "last_checkpoint").is_file() or checkpoint_names(str(args.output))
    if (args.resume or args.eval_only) and not there:
        raise MissingFileError(f"{args.output} has no checkpoint: train first, without --resume")
    if there and not (args.resume or args.eval_only):
        raise UserError(f"{args.output} has a checkpoint: add --resume, or name another --output")


@exit_on_error("train_classifier")
def main(words: list[str] | None = None) -> None:
    """Trains or evaluates."""
    args = parse_arguments(words)
    try:
        check_device(args.device, "--device")
        check_numbers(args)
        check_output(args)
        if dist.is_torchelastic_launched():
            join_torchrun()
        trainer = ClassifierTrainer(args)
        setup_logger(str(args.output), distributed_rank=comm.get_rank())
        if args.eval_only:
            trainer.resume()
            results = trainer.evaluate()
            if comm.is_main_process():
                print(json.dumps(results))
            return
        with lock_output_dir(str(args.output)), without_traceback():
            if args.resume:
                trainer.resume()
            trainer.train(trainer.start_iter, trainer.max_iter)
    except FloatingPointError as error:
        sys.exit(f"train_classifier: a lower --lr may help: {error}")


if __name__ == "__main__":
    main()
