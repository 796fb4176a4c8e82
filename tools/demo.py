#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains a small deformable detector on Shapes from scratch and draws its results.

    python tools/demo.py
    python tools/demo.py --config-file configs/Shapes/ca_rpn_slim_plain_demo.yaml \\
        --output output/plain

Writes the output of train_net.py, detections.png and, for a deformable model, sampling.png. Config
keys can be overridden at the end of the command line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from table.report import flatten
from table.runs import METRICS, OUTPUT, RESULTS, ROOT, WEIGHTS, metrics_backwards, watch
from tqdm import tqdm
from viewer.drawing import points_of_interest, prediction_panel, sampling_panel, visualizer
from viewer.predictor import Prediction, RecordingPredictor

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image

from dcn_plugin.analysis.figures import Panel, save_panels
from dcn_plugin.engine import check_config, read_config
from dcn_plugin.engine.config_checks import check_no_precomputed_proposals
from dcn_plugin.files import output_folder
from dcn_plugin.messages import UserError, exit_on_error

CONFIG = ROOT / "configs/Shapes/ca_rpn_slim_dconv3_demo.yaml"
MIN_SCORE = 0.5  # of detections that are drawn
IMAGES = 6  # in a picture
MAX_TRIED = 50  # images, to find some with detections
DETECTIONS, SAMPLING = "detections.png", "sampling.png"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default=str(CONFIG), help="config of a detector")
    add("--output", type=output_folder, default=Path("output/demo"), help="folder to write to")
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(words)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Stores the seconds that a step takes in `times`."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def train(args: argparse.Namespace, iterations: int) -> None:
    """Runs train_net.py with a progress bar; exits if it fails."""
    args.output.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, RESULTS):  # of an earlier run
        (args.output / name).unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", args.config_file]
    command += [*args.opts, "OUTPUT_DIR", str(args.output)]
    with (
        (args.output / OUTPUT).open("w") as output,
        tqdm(total=iterations, unit="iteration") as bar,
    ):

        def tell(_: str) -> None:
            done = next(metrics_backwards(args.output), {}).get("iteration", -1) + 1
            bar.update(min(done, iterations) - bar.n)

        error = watch(command, args.output, output, tell)
        if error is None:
            bar.update(iterations - bar.n)
    if error is not None:
        sys.exit(f"demo: training failed, {error}; see {args.output / OUTPUT}")


def ground_truth_panel(record: dict[str, Any], prediction: Prediction, metadata: Metadata) -> Panel:
    """Returns the ground truth boxes, without masks."""
    boxes = [
        {key: value for key, value in item.items() if key != "segmentation"}
        for item in record["annotations"]
    ]
    drawn = visualizer(prediction, metadata).draw_dataset_dict({"annotations": boxes})
    return Panel("ground truth", drawn.get_image())


def save_pictures(predictor: RecordingPredictor, dataset: str, output: Path) -> list[str]:
    """Saves pictures of some test images; returns lines that describe them."""
    for name in (DETECTIONS, SAMPLING):  # of an earlier run
        (output / name).unlink(missing_ok=True)
    metadata = MetadataCatalog.get(dataset)
    columns: list[list[Panel]] = []  # ground truth, detections, and sampling locations
    for record in DatasetCatalog.get(dataset)[:MAX_TRIED]:
        if len(columns) == IMAGES:
            break
        prediction = predictor(read_image(record["file_name"], "BGR"))
        if not len(prediction.instances):
            continue
        column = [
            ground_truth_panel(record, prediction, metadata),
            prediction_panel(prediction, metadata),
        ]
        if prediction.recording.choose():
            first, *_, last = points_of_interest(prediction, metadata)
            column += [sampling_panel(prediction, *each) for each in (first, last)]
        columns.append(column)
    if not columns:
        return [f"no pictures: there were no detections with a score above {MIN_SCORE}"]
    rows = list(zip(*columns, strict=True))
    save_panels(output / DETECTIONS, rows[:2])
    lines = [f"{output / DETECTIONS}: ground truth and detections"]
    if rows[2:]:
        save_panels(output / SAMPLING, rows[2:])
        lines.append(f"{output / SAMPLING}: sampling locations (red) of one position (green)")
    return lines


def report(args: argparse.Namespace, times: dict[str, float], pictures: list[str]) -> None:
    """Prints metrics, times and the files to look at."""
    metrics = flatten(json.loads((args.output / RESULTS).read_text()))
    names = ["AP", "AP50", "AP70", "AP75"]
    values = [
        *(f"{metrics[f'bbox/{name}']:.1f}" for name in names),
        *(f"{s:.0f}" for s in times.values()),
    ]
    lines = [[*names, *(f"{name}, s" for name in times)], ["---"] * len(values), values]
    print("", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
    print(*pictures, f"{args.output / RESULTS}, log.txt: metrics and log", sep="\n")


def print_visualize_command(args: argparse.Namespace, dataset: str) -> None:
    """Prints how to make HTML pages that show the sampling locations of clicked positions."""
    config, weights = os.path.relpath(args.config_file), str(args.output / WEIGHTS)
    words = ["--config-file", config, "--weights", weights, "--input", dataset]
    words += ["--output", f"{args.output}_visualize", *args.opts]
    program = [os.path.relpath(path) for path in (sys.executable, ROOT / "tools/visualize.py")]
    print(f"pages to click on: {shlex.join([*program, *words])}")


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    cfg = read_config(args)
    check_config(cfg, True, stock_trainer=True)
    check_no_precomputed_proposals(cfg)
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST must be one data set, got {cfg.DATASETS.TEST}")
    if MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("evaluator_type") != "coco":
        raise UserError(f"DATASETS.TEST must be in COCO's format, got {cfg.DATASETS.TEST[0]}")
    return cfg


def run(args: argparse.Namespace) -> None:
    """Generates the data, trains, evaluates and draws."""
    times: dict[str, float] = {}
    cfg = read_settings(args)
    (dataset,) = cfg.DATASETS.TEST
    with timed(times, "data"):
        for name in (*cfg.DATASETS.TRAIN, dataset):
            DatasetCatalog.get(name)
    with timed(times, "training and evaluation"):
        train(args, cfg.SOLVER.MAX_ITER)
    with timed(times, "pictures"):
        cfg.MODEL.WEIGHTS = str(args.output / WEIGHTS)
        predictor = RecordingPredictor(cfg, MIN_SCORE)
        pictures = save_pictures(predictor, dataset, args.output)
    report(args, times, pictures)
    if predictor.is_deformable:
        print_visualize_command(args, dataset)


@exit_on_error("demo")
def main(words: list[str] | None = None) -> None:
    """Runs the demo; when it is terminated, so is its training."""
    args = parse_arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: terminated"))
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")


if __name__ == "__main__":
    main()
