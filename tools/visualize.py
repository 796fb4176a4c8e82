#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shows sampling locations, offsets and RoI bins of a trained model on images or a video.

    python tools/visualize.py --config-file configs/Shapes/ca_rpn_slim_dconv3_demo.yaml \\
        --weights output/demo/model_final.pth --input shapes_demo_test --output output/visualize
    python tools/visualize.py --config-file … --weights … --input street.jpg \\
        --points 120,80 40,200 --output output/visualize

Writes for every image a picture, <name>.png, of the detections, sampling locations through all
deformable layers, RoI bins of the highest-scoring detection and offsets, and a self-contained page,
<name>.html, on which positions and objects can be clicked. For a model trained on custom data,
--test-data gives the names of its classes, and --input custom_test its images. Config keys can be
overridden at the end of the command line.
"""

from __future__ import annotations

import argparse
from itertools import chain

from tqdm import tqdm
from viewer.drawing import save_interactive, save_picture
from viewer.inputs import InputImage, comma_separated, read_inputs
from viewer.predictor import RecordingPredictor

from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils.logger import setup_logger

from dcn_plugin.data import add_custom_data_option
from dcn_plugin.engine import read_trained_config
from dcn_plugin.files import output_folder
from dcn_plugin.messages import UserError, exit_on_error


def point(text: str) -> tuple[float, float]:
    """Parses x,y."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be x,y, two numbers, got {text!r}") from error
    return x, y


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="config of the model")
    add("--weights", required=True, help="checkpoint of the model")
    add("--input", required=True, help="an image, a folder, a video, or the name of a data set")
    add("--output", type=output_folder, required=True, help="folder to write to")
    points_help = "pixels to trace from; put another option after them"
    add("--points", type=point, nargs="+", default=[], metavar="x,y", help=points_help)
    layers_help = "deformable layers to trace through; default: all"
    add("--layers", type=comma_separated, metavar="NAME,NAME", help=layers_help)
    add("--score", type=float, default=0.5, help="minimum score of detections")
    add("--limit", type=int, default=20, help="maximum number of images")
    add("--format", choices=("png", "html", "both"), default="both", help="files to write")
    add_custom_data_option(parser, "test")
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(words)


def save(
    args: argparse.Namespace, metadata: Metadata, predictor: RecordingPredictor, image: InputImage
) -> None:
    """Writes the files of one image."""
    height, width = image.pixels.shape[:2]
    for x, y in args.points:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"--points must be inside {image.name}, x below {width} and y below {height}, got "
                f"{x:g},{y:g}"
            )
    prediction = predictor(image.pixels)
    chosen = prediction.recording.choose(args.layers)  # before anything is written
    if args.points and not chosen:
        raise UserError("--points: no deformable convolution has known positions on the image")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.format != "html":
        path = args.output / f"{image.name}.png"
        save_picture(path, prediction, metadata, args.points, args.layers)
    if args.format != "png":
        path = args.output / f"{image.name}.html"
        save_interactive(path, image.name, prediction, metadata, args.layers)


@exit_on_error("visualize")
def main(words: list[str] | None = None) -> None:
    """Visualizes all images."""
    args = parse_arguments(words)
    setup_logger()
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if not 0 <= args.score <= 1:
        raise UserError(f"--score must be from 0 to 1, got {args.score:g}")
    cfg = read_trained_config(args)
    images = read_inputs(args.input, args.limit)
    first = next(images)  # without images, fails before the model is built
    predictor = RecordingPredictor(cfg, args.score)
    predictor.require_deformable()
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unused")
    count = 0
    for image in tqdm(chain([first], images), unit="image"):
        save(args, metadata, predictor, image)
        count += 1
    print(f"wrote the visualizations of {count} image{'s' if count > 1 else ''} to {args.output}")


if __name__ == "__main__":
    main()
