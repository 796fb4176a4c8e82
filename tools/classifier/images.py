# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Folders of images as batches, in the form that Detectron2's networks take by default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

# Detectron2's MODEL.PIXEL_MEAN: blue, green, red; its MODEL.PIXEL_STD is 1.
MEAN = (103.530, 116.280, 123.675)


class ToDetectron2(torch.nn.Module):
    """Turns an RGB picture into what a network gets with Detectron2's default config."""

    def forward(self, picture: Tensor) -> Tensor:
        """Converts Tensor[3, H, W] of bytes, RGB, to floats, BGR, without the mean."""
        return picture.flip(0).float() - torch.tensor(MEAN)[:, None, None]


def training_view(short_side: Sequence[int], crop: int) -> v2.Compose:
    """Returns the augmentation of the ResNet paper: scale, crop and flip.

    Args:
        short_side: least and most, in pixels, to which the shorter side is scaled.
        crop: side of the square cut from a random place.
    """
    return v2.Compose(
        [
            v2.RandomResize(short_side[0], short_side[1] + 1, antialias=True),
            v2.RandomCrop(crop, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            ToDetectron2(),
        ]
    )


def validation_view(short_side: int, crop: int) -> v2.Compose:
    """Returns one view of each image, from its middle.

    Args:
        short_side: to which the shorter side is scaled.
        crop: side of the square cut from the middle.
    """
    return v2.Compose(
        [
            v2.Resize(short_side, antialias=True),
            v2.CenterCrop(crop),
            v2.PILToTensor(),
            ToDetectron2(),
        ]
    )


class Share(Sampler[int]):
    """The images of one process: shuffled anew every epoch, or all of them once in order.

    For training every process gets as many, and the last few images of an epoch wait for another;
    for validation every image is in one share.
    """

    def __init__(self, images: int, rank: int, processes: int, seed: int | None) -> None:
        """Divides.

        Args:
            images: in all.
            rank: of this process.
            processes: among which images are divided.
            seed: of the order; None: no shuffling.
        """
        self.images = images
        self.rank = rank
        self.processes = processes
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        """Yields the images' numbers."""
        if self.seed is None:
            return iter(range(self.rank, self.images, self.processes))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator).tolist()
        return iter(order[self.rank : len(self) * self.processes : self.processes])

    def __len__(self) -> int:
        """Returns how many images the share has."""
        if self.seed is None:
            return len(range(self.rank, self.images, self.processes))
        return self.images // self.processes


def open_folders(root: Path) -> tuple[ImageFolder, ImageFolder]:
    """Opens root/train and root/val.

    Args:
        root: of both, each with a folder of images for every class.

    Raises:
        FileNotFoundError: if one of them is missing or has no images.
        ValueError: if they do not have the same classes.
    """
    folders = []
    for part in ("train", "val"):
        try:
            folders.append(ImageFolder(root / part))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{root / part} must have a folder of images for every class: {error}"
            ) from None
    train, val = folders
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{root}/train and {root}/val must have the same classes, only one has "
            f"{', '.join(different[:5])}"
        )
    return train, val


def batches(
    folder: ImageFolder, view: v2.Compose, share: Share, batch: int, workers: int
) -> DataLoader:
    """Makes the loader of one process.

    Args:
        folder: whose images.
        view: what is done to each.
        share: which of them.
        batch: images at once.
        workers: processes that read.
    """
    folder.transform = view
    return DataLoader(
        folder,
        batch,
        sampler=share,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=share.seed is not None,
    )
