#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Writes the labels of VOC 2012 segmentation with SBD's additions: 10,582 images to learn from.

    python tools/prepare_sbd.py --sbd path/to/benchmark_RELEASE --voc datasets/VOC2012

SBD (Semantic Boundaries Dataset) labels images of VOC in .mat files. This reads them and VOC's own
labels, and writes to the folder of VOC 2012 what the data sets voc_2012_sem_seg_train_aug, _train
and _val read: SegmentationClassAug/<image>.png, whose pixels are classes, and the list
ImageSets/Segmentation/train_aug.txt. Where both label an image VOC's labels are taken; the images
of VOC's val are left out of train_aug. What is there already is not written again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from dcn_plugin.files import whole_file

OUTPUT, LIST = "SegmentationClassAug", "ImageSets/Segmentation/{}.txt"
CLASSES, IGNORED = 21, 255


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "VOC2012"
    parser.add_argument("--sbd", type=Path, required=True, help="the folder with dataset/cls")
    parser.add_argument("--voc", type=Path, default=default, help=f"VOC 2012's, now {default}")
    return parser.parse_args(words)


def read_list(path: Path) -> list[str]:
    """Reads the names of images."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path.read_text().split()


def read_sbd(path: Path) -> np.ndarray:
    """Reads the labels of one of SBD's files."""
    try:
        labels = loadmat(path, squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
    except Exception as error:  # half a file leads SciPy to anything
        raise ValueError(f"{path} is not one of SBD's files: {error}") from error
    return np.asarray(labels, dtype=np.uint8)


def read_voc(path: Path) -> np.ndarray:
    """Reads the labels of one of VOC's files, whose colours stand for classes."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path} must have a palette, as VOC's labels do; it is {image.mode}")
        return np.asarray(image)


def write_labels(path: Path, labels: np.ndarray, source: Path) -> None:
    """Writes labels, whole or not at all."""
    unknown = np.setdiff1d(labels, [*range(CLASSES), IGNORED])
    if unknown.size:
        raise ValueError(f"{source} must have labels 0 to 20 and 255, got {unknown.tolist()}")
    with whole_file(path) as half:
        Image.fromarray(labels).save(half, format="PNG")


def prepare(sbd: Path, voc: Path) -> dict[str, int]:
    """Writes everything.

    Args:
        sbd: folder with dataset/train.txt, dataset/val.txt and dataset/cls.
        voc: VOC2012, with ImageSets/Segmentation and SegmentationClass.

    Returns:
        the number of images to learn from and to validate on.
    """
    val = read_list(voc / LIST.format("val"))
    own = [*read_list(voc / LIST.format("train")), *val]
    added = [name for split in ("train", "val") for name in read_list(sbd / f"dataset/{split}.txt")]
    sources = {name: sbd / "dataset/cls" / f"{name}.mat" for name in added}
    sources |= {name: voc / "SegmentationClass" / f"{name}.png" for name in own}
    missing = [str(source) for source in sources.values() if not source.is_file()]
    if missing:
        raise FileNotFoundError(f"there is no {missing[0]}; {len(missing)} files are missing")
    folder = voc / OUTPUT
    folder.mkdir(exist_ok=True)
    for name, source in tqdm(sources.items(), "labels"):
        path = folder / f"{name}.png"
        if not path.is_file():
            labels = read_voc(source) if source.suffix == ".png" else read_sbd(source)
            write_labels(path, labels, source)
    learnt = sorted(sources.keys() - set(val))
    (voc / LIST.format("train_aug")).write_text("\n".join(learnt) + "\n")
    return {"train_aug": len(learnt), "val": len(val)}


def main(words: list[str] | None = None) -> None:
    """Writes the files, and says how many there are."""
    args = parse_arguments(words)
    try:
        counts = prepare(args.sbd, args.voc)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_sbd: {error}")
    print(
        f"{counts['train_aug']} images to learn from (10582 of the whole SBD and VOC), "
        f"{counts['val']} to validate on (1449)"
    )


if __name__ == "__main__":
    main()
