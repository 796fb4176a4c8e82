#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures the effective dilation of a trained model's deformable layers (Table 2).

    python tools/effective_dilation.py --config-file configs/Shapes/ca_rpn_slim_dconv3_demo.yaml \\
        --weights output/demo/model_final.pth --dataset shapes_demo_test --areas 48 80

Filters are grouped by what they are centred on: background, or a small, medium or large object; the
areas of objects are split at the squares of --areas, in pixels of the model's input. With
--on-object a second table has the share of sampling locations, traced from the centre of each
object through all layers, that are on the object. Custom data in COCO format are given as for
train_net.py, by --test-data and two paths instead of --dataset. Config keys can be overridden at
the end of the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from viewer.inputs import comma_separated

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils.logger import setup_logger

from dcn_plugin.analysis import AnnotatedImage, Dilation, effective_dilation, on_object_share
from dcn_plugin.analysis.effective_dilation import AREAS, CATEGORIES
from dcn_plugin.analysis.on_object_share import OFFSETS, OnObjectShare
from dcn_plugin.data import add_custom_data_option
from dcn_plugin.engine import load_model, read_trained_config
from dcn_plugin.engine.config_checks import check_datasets
from dcn_plugin.messages import UserError, exit_on_error

NO_BOXES = torch.zeros(0, 4)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="config of the model")
    add("--weights", required=True, help="checkpoint of the model")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--dataset", help="name of a registered data set with boxes")
    add_custom_data_option(data, "test")
    areas, metavar = [area**0.5 for area in AREAS], ("MEDIUM", "LARGE")
    areas_help = "sides of squares; default: the paper's 96 and 224"
    add("--areas", type=float, nargs=2, metavar=metavar, default=areas, help=areas_help)
    add("--on-object", action="store_true", help="measure on-object shares too")
    layers_help = "deformable layers to trace through; default: all"
    add("--layers", type=comma_separated, metavar="NAME,NAME", help=layers_help)
    add("--limit", type=int, default=0, help="maximum number of images; 0: all")
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(words)


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    if args.limit < 0:
        raise UserError(f"--limit must be 0 or more, got {args.limit}")
    cfg = read_trained_config(args)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    check_datasets(cfg, training=False, stock_trainer=True)
    return cfg


def annotated_images(cfg: CfgNode, limit: int) -> Iterator[AnnotatedImage]:
    """Yields the images of the data set, transformed as for testing, with their boxes."""
    augmentations = build_augmentation(cfg, is_train=False)
    # A mapper for testing drops the annotations.
    mapper = DatasetMapper(
        is_train=True, augmentations=augmentations, image_format=cfg.INPUT.FORMAT
    )
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    if not any(record.get("annotations") for record in records):
        raise UserError(f"the data set must have boxes, {cfg.DATASETS.TEST[0]} has none")
    for record in tqdm(records[: limit or None], unit="image"):
        mapped = mapper(record)
        inputs = {key: mapped[key] for key in ("image", "height", "width")}
        size = tuple(mapped["image"].shape[1:])
        yield AnnotatedImage([inputs], boxes_of(mapped), size, crowds_of(record, mapper))


def boxes_of(mapped: dict[str, Any]) -> Tensor:
    """Returns Tensor[M, 4], the boxes of a mapped image."""
    return mapped["instances"].gt_boxes.tensor if "instances" in mapped else NO_BOXES


def crowds_of(record: dict[str, Any], mapper: DatasetMapper) -> Tensor:
    """Returns Tensor[C, 4], the boxes of crowds, which the mapper drops."""
    crowds = [{**x, "iscrowd": 0} for x in record.get("annotations", ()) if x.get("iscrowd")]
    return boxes_of(mapper({**record, "annotations": crowds})) if crowds else NO_BOXES


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def dilation_table(dilations: dict[str, dict[str, Dilation]]) -> str:
    """Returns mean and standard deviation by layer and category."""
    rows = [
        [name, *(f"{d.mean:.2f} ± {d.std:.2f}" if d.filters else "none" for d in row.values())]
        for name, row in dilations.items()
    ]
    first = next(iter(dilations.values())).values()
    counts = ["filters of the first", *(str(d.filters) for d in first)]
    return markdown(["layer", *CATEGORIES], [*rows, counts])


def share_table(shares: dict[str, OnObjectShare]) -> str:
    """Returns on-object shares in percent by kind of offsets and size of objects."""
    values = {name: [share.by_offsets[name] for share in shares.values()] for name in OFFSETS}
    values["random locations"] = [share.of_image for share in shares.values()]
    rows = [[name, *(f"{100 * value:.1f}" for value in row)] for name, row in values.items()]
    counts = ["objects", *(str(share.objects) for share in shares.values())]
    return markdown(["offsets", *shares], [*rows, counts])


@exit_on_error("effective_dilation")
def main(words: list[str] | None = None) -> None:
    """Prints the tables."""
    args = parse_arguments(words)
    setup_logger()
    cfg = read_settings(args)
    model = load_model(cfg)
    areas = [side**2 for side in args.areas]
    images = annotated_images(cfg, args.limit)
    print(dilation_table(effective_dilation(model, images, areas=areas)))
    if args.on_object:
        images = annotated_images(cfg, args.limit)
        shares = on_object_share(model, images, areas=areas, layers=args.layers)
        print(f"\n{share_table(shares)}")


if __name__ == "__main__":
    main()
