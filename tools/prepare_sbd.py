#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Prepares the labels of VOC 2012 and SBD for semantic segmentation: 10,582 training images.

    python tools/prepare_sbd.py --sbd path/to/benchmark_RELEASE --voc datasets/VOC2012

SBD (Semantic Boundaries Dataset) has labels of VOC images in .mat files. This tool reads them and
VOC's own labels, and writes what the data sets voc_2012_sem_seg_train_aug, _train and _val read, to
the folder of VOC 2012: SegmentationClassAug/<image>.png, whose pixels are class ids, and the list
ImageSets/Segmentation/train_aug.txt. For an image in both, VOC's labels are used; train_aug has no
images of VOC's val. Existing files are not written again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from dcn_plugin.files import atomic_write
from dcn_plugin.messages import MissingFileError, UserError, exit_on_error

OUTPUT, LIST = "SegmentationClassAug", "ImageSets/Segmentation/{}.txt"
CLASSES, IGNORED = 21, 255


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "VOC2012"
    parser.add_argument("--sbd", type=Path, required=True, help="folder with dataset/cls")
    parser.add_argument(
        "--voc", type=Path, default=default, help=f"folder of VOC 2012; default: {default}"
    )
    return parser.parse_args(words)


def read_list(path: Path) -> list[str]:
    """Reads a list of image names."""
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    try:
        return path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be a text file of image names: {error}") from error


def read_sbd(path: Path) -> np.ndarray:
    """Reads the labels from a .mat file of SBD."""
    try:
        labels = loadmat(path, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
    except Exception as error:  # SciPy raises many types on damaged files
        raise UserError(f"{path} is not a .mat file of SBD, or damaged: {error}") from error
    return np.asarray(labels, dtype=np.uint8)


def read_voc(path: Path) -> np.ndarray:
    """Reads the labels from a PNG of VOC, whose palette indices are class ids."""
    try:
        with Image.open(path) as image:
            mode, labels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # of PIL on damaged files
        raise UserError(f"{path} is not an image, or damaged: {error}") from error
    if mode not in ("P", "L"):
        raise UserError(f"{path} must have a palette or grey values, got mode {mode}")
    return labels


def write_labels(path: Path, labels: np.ndarray, source: Path) -> None:
    """Checks labels and writes them atomically."""
    unknown = np.setdiff1d(labels, [*range(CLASSES), IGNORED])
    if unknown.size:
        raise UserError(f"{source} must have labels 0 to 20 and 255, got {unknown.tolist()}")
    with atomic_write(path) as temporary:
        Image.fromarray(labels).save(temporary, format="PNG")


def prepare(sbd: Path, voc: Path) -> dict[str, int]:
    """Writes all labels and the list of train_aug.

    Args:
        sbd: folder with dataset/train.txt, dataset/val.txt and dataset/cls.
        voc: VOC2012, with ImageSets/Segmentation and SegmentationClass.

    Returns:
        the number of images in train_aug and val.
    """
    val = read_list(voc / LIST.format("val"))
    of_voc = [*read_list(voc / LIST.format("train")), *val]
    of_sbd = [
        name for split in ("train", "val") for name in read_list(sbd / f"dataset/{split}.txt")
    ]
    sources = {name: sbd / "dataset/cls" / f"{name}.mat" for name in of_sbd}
    sources |= {name: voc / "SegmentationClass" / f"{name}.png" for name in of_voc}
    missing = [str(source) for source in sources.values() if not source.is_file()]
    if missing:
        raise MissingFileError(f"{len(missing)} files do not exist, the first is {missing[0]}")
    folder = voc / OUTPUT
    folder.mkdir(exist_ok=True)
    for name, source in tqdm(sources.items(), "labels"):
        path = folder / f"{name}.png"
        if not path.is_file():
            labels = read_voc(source) if source.suffix == ".png" else read_sbd(source)
            write_labels(path, labels, source)
    train_aug = sorted(sources.keys() - set(val))
    (voc / LIST.format("train_aug")).write_text("\n".join(train_aug) + "\n")
    return {"train_aug": len(train_aug), "val": len(val)}


@exit_on_error("prepare_sbd")
def main(words: list[str] | None = None) -> None:
    """Runs the tool; prints the number of images."""
    args = parse_arguments(words)
    counts = prepare(args.sbd, args.voc)
    print(
        f"{counts['train_aug']} training images (10582 with all of VOC and SBD), "
        f"{counts['val']} validation images (1449)"
    )


if __name__ == "__main__":
    main()
