#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains a small deformable detector on Shapes, from nothing, and shows what it learnt.

    python tools/demo.py
    python tools/demo.py --config-file configs/Shapes/ca_rpn_slim_plain_demo.yaml \
        --output output/plain

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

from table.runs import METRICS, OUTPUT, RESULTS, ROOT, WEIGHTS, last_metrics, watch
from tqdm import tqdm
from viewer.drawing import found_panel, points_of_interest, sampling_panel, scale_for_text
from viewer.network import Seen, Viewer

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer

from dcn_plugin.analysis.pictures import Panel, save_panels
from dcn_plugin.data.check import learns_boxes
from dcn_plugin.engine import check_config, read_config

CONFIG = ROOT / "configs/Shapes/ca_rpn_slim_dconv3_demo.yaml"
SURE = 0.5  # score of detections that are shown
IMAGES = 6  # in a picture
LOOKED_AT = 50  # images, to find some in which something was found
DETECTIONS, SAMPLING = "detections.png", "sampling.png"


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

        def tell(_: str) -> None:
            done = (last_metrics(args.output) or {}).get("iteration", -1) + 1
            bar.update(min(done, iterations) - bar.n)

        error = watch(command, args.output, output, tell)
        if error is None:
            bar.update(iterations - bar.n)
    if error is not None:
        sys.exit(f"demo: the training failed, {error}; {args.output / OUTPUT} has all of it")


def truth_panel(record: dict[str, Any], seen: Seen, metadata: Metadata) -> Panel:
    """Draws the boxes of the truth: no masks and labels of pixels, which detectors do not find."""
    annotations = [
        {key: value for key, value in item.items() if key != "segmentation"}
        for item in record["annotations"]
    ]
    kept = {key: value for key, value in record.items() if key != "sem_seg_file_name"}
    drawing = Visualizer(seen.original, metadata, scale=scale_for_text(seen))
    shown = drawing.draw_dataset_dict({**kept, "annotations": annotations})
    return Panel("truth", shown.get_image())


def sampling_panels(seen: Seen, metadata: Metadata) -> list[Panel]:
    """Draws where a cell in the surest object samples, and one of the background."""
    first, *_, last = points_of_interest(seen, metadata)
    return [sampling_panel(seen, title, point) for title, point in (first, last)]


def picture(cfg: CfgNode, output: Path) -> list[str]:
    """Saves pictures of some test images; returns what they are."""
    for name in (DETECTIONS, SAMPLING):  # of an earlier demo
        (output / name).unlink(missing_ok=True)
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(output / WEIGHTS)
    viewer = Viewer(cfg, SURE)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    columns: list[list[Panel]] = []  # truth, what was found, and samples
    for record in DatasetCatalog.get(cfg.DATASETS.TEST[0])[:LOOKED_AT]:
        if len(columns) == IMAGES:
            break
        seen = viewer.look(read_image(record["file_name"], "BGR"))
        if len(seen.instances):
            samples = sampling_panels(seen, metadata) if seen.recording.layers else []
            found = found_panel(seen, metadata)
            columns.append([truth_panel(record, seen, metadata), found, *samples])
    if not columns:
        return [f"no pictures: nothing was found with a score above {SURE}"]
    rows = list(zip(*columns, strict=True))
    save_panels(output / DETECTIONS, rows[:2])
    said = [f"{output / DETECTIONS}: what was found, below the truth"]
    if rows[2:]:
        save_panels(output / SAMPLING, rows[2:])
        said.append(f"{output / SAMPLING}: where a cell (green) looks at the image (red)")
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
    print("What to try next, with .venv/bin/python in front:")
    print("  tools/demo.py --config-file configs/Shapes/ca_rpn_slim_plain_demo.yaml \\")
    print("    --output output/plain     # the same network without deformable convolutions")
    print(f"  tools/visualize.py --config-file {args.config_file} \\")
    print(f"    --weights {args.output / WEIGHTS} --input shapes_demo_test --output output/looks")
    print("    # pages on which you click to see where it looks")


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
