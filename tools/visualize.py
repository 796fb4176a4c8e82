#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shows where a trained network looks: on images, a video or a data set.

    python tools/visualize.py --config-file configs/Shapes/ca_rpn_slim_dconv3_demo.yaml \
        --weights output/demo/model_final.pth --input shapes_demo_test --output output/looks
    python tools/visualize.py --config-file … --weights … --input street.jpg \
        --points 120,80 40,200 --output output/looks

Of every image OUTPUT gets a picture, <name>.png: what was found, where points sample through all
deformable layers, the parts of the surest object, the fields of offsets; and a page, <name>.html,
on which one clicks a point or an object. Pages are whole in themselves. --test-data tells the
classes of a network that learnt data of your own; --input own_test are its images. Keys of the
config can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm
from viewer.drawing import save_interactive, save_picture
from viewer.inputs import Input, read_inputs
from viewer.network import Viewer
from viewer.options import add_layers

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

from dcn_plugin.data import add_own_data
from dcn_plugin.engine.settings import read_trained_config


def point(text: str) -> tuple[float, float]:
    """Reads x,y."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be x,y, two numbers, got {text!r}") from error
    return x, y


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="of the network")
    add("--weights", required=True, help="of the network")
    add("--input", required=True, help="an image, a folder, a video, or the name of a data set")
    add("--output", type=Path, required=True, help="folder")
    add(
        "--points",
        type=point,
        nargs="+",
        default=[],
        metavar="x,y",
        help="pixels of the image; the last of them before another option",
    )
    add_layers(parser)
    add("--score", type=float, default=0.5, help="of detections that are shown, at least")
    add("--limit", type=int, default=20, help="images of a folder, video or data set")
    add("--format", choices=("png", "html", "both"), default="both", help="what to write")
    add_own_data(parser, "test")
    add("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    return read_trained_config(args)


def show(args: argparse.Namespace, cfg: CfgNode, viewer: Viewer, image: Input) -> None:
    """Writes the files of one image."""
    height, width = image.pixels.shape[:2]
    for x, y in args.points:
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f"--points must lie in {image.name}, x below {width} and y below {height}, got "
                f"{x:g},{y:g}"
            )
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")
    seen = viewer.look(image.pixels)
    seen.recording.choose(args.layers)  # to know if there are no such layers
    if args.points and not seen.recording.choose():
        raise ValueError(
            "--points need deformable convolutions on maps of the image, this network has none"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    if args.format != "html":
        path = args.output / f"{image.name}.png"
        save_picture(path, seen, metadata, args.points, args.layers)
    if args.format != "png":
        path = args.output / f"{image.name}.html"
        save_interactive(path, image.name, seen, metadata, args.layers)


def main(words: list[str] | None = None) -> None:
    """Looks at all images."""
    args = parse_arguments(words)
    setup_logger()
    count = 1
    try:
        cfg = read_settings(args)
        images = read_inputs(args.input, args.limit)
        first = next(images, None)  # before the network is built
        if first is None:
            raise ValueError(f"--input: there are no images in {args.input}")
        viewer = Viewer(cfg, args.score)
        viewer.require_deformable()
        show(args, cfg, viewer, first)
        for image in tqdm(images, "looking", initial=1, unit="image"):
            show(args, cfg, viewer, image)
            count += 1
    except (OSError, ValueError, KeyError, AssertionError) as error:
        sys.exit(f"visualize: {error}")
    print(f"{args.output}: what was seen in {count} images")


if __name__ == "__main__":
    main()
