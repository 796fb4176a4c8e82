#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures how far apart the filters of a trained network sample (Table 2).

    python tools/effective_dilation.py --config-file configs/Shapes/ca_rpn_slim_dconv3_demo.yaml \
        --weights output/demo/model_final.pth --dataset shapes_demo_test --areas 48 80

Filters are told apart by what they are centred on: small, medium and large objects, whose areas are
split at the squares of --areas in pixels of the image as the network sees it, and the background.
With --follow there is a second table: how many of the points that cells in the middle of objects
sample through all layers lie on the object.
Data of your own in COCO's format are named as for train_net.py, by --test-data and two paths in the
place of --dataset. Keys of the config can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from viewer.options import add_layers

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.utils.logger import setup_logger

from dcn_plugin.analysis import (
    AnnotatedImage,
    Dilation,
    Share,
    effective_dilation,
    share_on_objects,
)
from dcn_plugin.analysis.dilation import AREAS, KINDS
from dcn_plugin.analysis.following import OFFSETS
from dcn_plugin.data import add_own_data, check_datasets
from dcn_plugin.engine import load_network
from dcn_plugin.engine.settings import read_trained_config

NO_BOXES = torch.zeros(0, 4)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="of the network")
    add("--weights", required=True, help="of the network")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", help="a name in Detectron2's catalogue, with boxes")
    add_own_data(data, "test")
    add(
        "--areas",
        type=float,
        nargs=2,
        metavar=("MEDIUM", "LARGE"),
        default=[area**0.5 for area in AREAS],
        help="sides of squares; default: the paper's 96 and 224",
    )
    add("--follow", action="store_true", help="measure how many points lie on the object, too")
    add_layers(parser)
    add("--limit", type=int, default=0, help="images to look at; 0: all")
    add("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    if args.limit < 0:
        raise ValueError(f"--limit must be 0 or more, got {args.limit}")
    cfg = read_trained_config(args)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    check_datasets(cfg, training=False)
    return cfg


def annotated_images(cfg: CfgNode, limit: int) -> Iterator[AnnotatedImage]:
    """Yields the images of the data set as the network sees them in tests, with their boxes."""
    mapper = DatasetMapper(cfg, is_train=False)
    with_boxes = DatasetMapper(
        is_train=True,
        augmentations=mapper.augmentations.augs,
        image_format=cfg.INPUT.FORMAT,
    )
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    if not any(record.get("annotations") for record in records):
        raise ValueError(f"the data set must have boxes, {cfg.DATASETS.TEST[0]} has none")
    for record in tqdm(records[: limit or None], "looking", unit="image"):
        mapped = with_boxes(record)
        inputs = {key: mapped[key] for key in ("image", "height", "width")}
        size = tuple(mapped["image"].shape[1:])
        yield AnnotatedImage([inputs], boxes_of(mapped), size, crowds_of(record, with_boxes))


def boxes_of(mapped: dict[str, Any]) -> Tensor:
    """Returns Tensor[M, 4], the objects of an image as the mapper gives it."""
    return mapped["instances"].gt_boxes.tensor if "instances" in mapped else NO_BOXES


def crowds_of(record: dict[str, Any], mapper: DatasetMapper) -> Tensor:
    """Returns Tensor[C, 4], the crowds of an image, which the mapper leaves out."""
    crowds = [
        {**each, "iscrowd": 0} for each in record.get("annotations", ()) if each.get("iscrowd")
    ]
    return boxes_of(mapper({**record, "annotations": crowds})) if crowds else NO_BOXES


def table(found: dict[str, dict[str, Dilation]]) -> str:
    """Returns a row for each layer, in Markdown."""
    lines = [f"| layer | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|"]
    for name, kinds in found.items():
        cells = [f"{d.mean:.2f} ± {d.std:.2f}" if d.filters else "none" for d in kinds.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = [f"{d.filters}" for d in next(iter(found.values())).values()]
    return "\n".join([*lines, f"| filters of the first | {' | '.join(counts)} |"])


def table_of_shares(shares: dict[str, Share]) -> str:
    """Returns a row for each kind of offsets, in Markdown: per cents of points on the object."""
    lines = [f"| offsets | {' | '.join(shares)} |", "|---" * (1 + len(shares)) + "|"]
    rows = {name: [share.by_offsets[name] for share in shares.values()] for name in OFFSETS}
    rows["points at random"] = [share.of_image for share in shares.values()]
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(
        [*lines, f"| objects | {' | '.join(str(s.objects) for s in shares.values())} |"]
    )


def main(words: list[str] | None = None) -> None:
    """Prints the table."""
    args = parse_arguments(words)
    setup_logger()
    try:
        cfg = read_settings(args)
        model = load_network(cfg)
        areas = [side**2 for side in args.areas]
        print(table(effective_dilation(model, annotated_images(cfg, args.limit), areas=areas)))
        if args.follow:
            images = annotated_images(cfg, args.limit)
            shares = share_on_objects(model, images, areas=areas, layers=args.layers)
            print(f"\n{table_of_shares(shares)}")
    except (OSError, ValueError) as error:
        sys.exit(f"effective_dilation: {error}")


if __name__ == "__main__":
    main()
