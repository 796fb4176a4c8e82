#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains a small deformable detector on Shapes, from nothing, and shows what it learnt.

    python tools/demo.py
    python tools/demo.py --config-file configs/Shapes/ca_rpn_slim_plain.yaml --output output/plain

OUTPUT gets what train_net.py leaves, detections.png and, of a deformable network, sampling.png.
Keys of the config can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from table.runs import METRICS, OUTPUT, RESULTS, ROOT, WEIGHTS, watch
from tqdm import tqdm
from viewer.points import emptiest_point

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

from dcn_plugin.analysis import Recording, cell_at, record, trace
from dcn_plugin.analysis.pictures import Panel, save_panels
from dcn_plugin.data.check import learns_boxes
from dcn_plugin.engine import check_config, read_config

CONFIG = ROOT / "configs/Shapes/ca_rpn_slim_dconv3_demo.yaml"
SURE = 0.5  # score of detections that are shown
IMAGES = 6  # in a picture
LOOKED_AT = 50  # images, to find some in which something was found
SCALE = 4  # of small images with text on them


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default=str(CONFIG), help="of a detector; default: that of the demo")
    add("--output", type=Path, default=Path("output/demo"), help="folder")
    add("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a step to `times`."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def train(args: argparse.Namespace, iterations: int) -> None:
    """Runs train_net.py; the program ends where that fails."""
    args.output.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, RESULTS):  # of an earlier demo
        (args.output / name).unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", args.config_file]
    command += [*args.opts, "OUTPUT_DIR", str(args.output)]
    with (
        (args.output / OUTPUT).open("w") as output,
        tqdm(total=iterations, unit="iteration") as bar,
    ):

        def tell(said: str) -> None:
            done = [int(word) for word in said.replace(",", " ").split() if word.isdigit()]
            if said.startswith("iteration"):
                bar.update(done[0] + 1 - bar.n)

        error = watch(command, args.output, output, tell)
        if error is None:
            bar.update(iterations - bar.n)
    if error is not None:
        sys.exit(f"demo: the training failed, {error}; {args.output / OUTPUT} has all of it")


def read_rgb(path: str) -> np.ndarray:
    """Reads an image as (height, width, 3) bytes, red, green, blue."""
    return convert_image_to_rgb(read_image(path, "BGR"), "BGR")


def boxes_only(record_: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without masks and labels of pixels, which detectors do not find."""
    annotations = [
        {key: value for key, value in item.items() if key != "segmentation"}
        for item in record_["annotations"]
    ]
    kept = {key: value for key, value in record_.items() if key != "sem_seg_file_name"}
    return {**kept, "annotations": annotations}


def picture_detections(
    cfg: CfgNode, records: list[dict[str, Any]], found: list[Instances], path: Path
) -> None:
    """Saves images with the truth on top and detections below."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    truths: list[Panel] = []
    detections: list[Panel] = []
    for record_, instances in zip(records, found, strict=True):
        image = read_rgb(record_["file_name"])
        truth = Visualizer(image, metadata, scale=SCALE).draw_dataset_dict(boxes_only(record_))
        sure = instances[instances.scores >= SURE]
        detected = Visualizer(image, metadata, scale=SCALE).draw_instance_predictions(sure)
        truths.append(Panel("truth", truth.get_image()))
        detections.append(Panel(f"found, score above {SURE}", detected.get_image()))
    save_panels(path, [truths, detections])


def picture_sampling(
    records: list[dict[str, Any]],
    found: list[Instances],
    recordings: list[Recording],
    names: list[str],
    path: Path,
) -> None:
    """Saves where a cell in the middle of the surest object samples, and one of the background."""
    rows: list[list[Panel]] = [[], []]
    for record_, instances, recording in zip(records, found, recordings, strict=True):
        image = read_rgb(record_["file_name"])
        best = int(instances.scores.argmax())
        x, y = instances.pred_boxes[best].get_centers()[0].tolist()
        name = names[int(instances.pred_classes[best])]
        boxes = BoxMode.convert(
            np.array([item["bbox"] for item in record_["annotations"]]),
            BoxMode.XYWH_ABS,
            BoxMode.XYXY_ABS,
        )
        empty = emptiest_point(image.shape[:2], boxes)
        points = (f"in a {name}", (x, y)), ("on the background", empty)
        for row, (title, point) in zip(rows, points, strict=True):
            row.append(Panel(title, image, trace(recording, cell_at(recording, point))))
    save_panels(path, rows)


def picture(cfg: CfgNode, output: Path) -> list[str]:
    """Saves pictures of some test images; returns what they are."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(output / WEIGHTS)
    predictor = DefaultPredictor(cfg)
    predictor.model.to("cpu")
    deformable = any("offset" in name for name, _ in predictor.model.backbone.named_parameters())
    records, found, recordings = [], [], []
    for record_ in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:LOOKED_AT]:
        with record(predictor.model) if deformable else contextlib.nullcontext() as recording:
            instances = predictor(read_image(record_["file_name"], cfg.INPUT.FORMAT))["instances"]
        instances = instances.to("cpu")
        if (instances.scores >= SURE).any():
            records.append(record_)
            found.append(instances)
            recordings.append(recording)
        if len(records) == IMAGES:
            break
    if not records:
        return [f"no pictures: nothing was found with a score above {SURE}"]
    picture_detections(cfg, records, found, output / "detections.png")
    said = [f"{output / 'detections.png'}: what was found, below the truth"]
    if deformable:
        names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
        picture_sampling(records, found, recordings, names, output / "sampling.png")
        said.append(f"{output / 'sampling.png'}: where a cell (green) looks at the image (red)")
    return said


def report(args: argparse.Namespace, times: dict[str, float], pictures: list[str]) -> None:
    """Prints the figures, where to look, and what to try next."""
    figures = json.loads((args.output / RESULTS).read_text())["bbox"]
    print()
    print("| AP | AP50 | AP70 | AP75 |" + "".join(f" {name}, s |" for name in times))
    print("|---" * (4 + len(times)) + "|")
    values = [f"{figures[key]:.1f}" for key in ("AP", "AP50", "AP70", "AP75")]
    print("| " + " | ".join(values + [f"{seconds:.0f}" for seconds in times.values()]) + " |")
    print()
    for line in [*pictures, f"{args.output / RESULTS}, log.txt: everything else"]:
        print(line)
    print("Next: tools/demo.py --config-file configs/Shapes/ca_rpn_slim_plain.yaml --output")
    print("output/plain trains the plain network; docs/evidence.md compares them on harder images.")


def main(words: list[str] | None = None) -> None:
    """Makes the data, trains, evaluates, and draws."""
    args = parse_arguments(words)
    times: dict[str, float] = {}
    try:
        cfg = read_config(args)
        check_config(cfg, True)
        if not learns_boxes(cfg.MODEL.META_ARCHITECTURE):
            raise ValueError(
                f"--config-file must be that of a detector, got {cfg.MODEL.META_ARCHITECTURE}"
            )
    except (OSError, ValueError) as error:
        sys.exit(f"demo: {error}")
    with timed(times, "data"):
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            DatasetCatalog.get(name)
    with timed(times, "training and test"):
        train(args, cfg.SOLVER.MAX_ITER)
    with timed(times, "pictures"):
        pictures = picture(cfg, args.output)
    report(args, times, pictures)


if __name__ == "__main__":
    main()
