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
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from table.runs import METRICS, OUTPUT, RESULTS, ROOT, WEIGHTS, metrics_backwards, watch
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
from dcn_plugin.engine.settings import refuse_proposals

CONFIG, PLAIN = (
    ROOT / f"configs/Shapes/ca_rpn_slim_{difference}_demo.yaml"
    for difference in ("dconv3", "plain")
)
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
            done = next(metrics_backwards(args.output), {}).get("iteration", -1) + 1
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


def picture(viewer: Viewer, dataset: str, output: Path) -> list[str]:
    """Saves pictures of some test images; returns what they are."""
    for name in (DETECTIONS, SAMPLING):  # of an earlier demo
        (output / name).unlink(missing_ok=True)
    metadata = MetadataCatalog.get(dataset)
    columns: list[list[Panel]] = []  # truth, what was found, and samples
    for record in DatasetCatalog.get(dataset)[:LOOKED_AT]:
        if len(columns) == IMAGES:
            break
        seen = viewer.look(read_image(record["file_name"], "BGR"))
        if len(seen.instances):
            samples = sampling_panels(seen, metadata) if seen.recording.choose() else []
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


def suggest(args: argparse.Namespace, dataset: str, deformable: bool) -> None:
    """Prints what to try next."""
    twin = PLAIN if deformable else CONFIG
    print("What to try next:")
    print(f"  # a network with{'out' if deformable else ''} deformable convolutions")
    print_command(
        "demo.py", "--config-file", os.path.relpath(twin), "--output", f"output/{twin.stem}"
    )
    if deformable:
        print("  # pages on which you click to see where it looks")
        files = ["--weights", str(args.output / WEIGHTS), "--output", f"{args.output}_looks"]
        config = os.path.relpath(args.config_file)
        words = ["--config-file", config, "--input", dataset, *files, *args.opts]
        print_command("visualize.py", *words)


def print_command(tool: str, *words: str) -> None:
    """Prints how to run one of the tools with the Python of now."""
    programs = [os.path.relpath(path) for path in (sys.executable, ROOT / "tools" / tool)]
    print(f"  {shlex.join([*programs, *words])}")


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    cfg = read_config(args)
    check_config(cfg, True)
    refuse_proposals(cfg)
    if not learns_boxes(cfg.MODEL.META_ARCHITECTURE):
        raise ValueError(
            f"--config-file must be that of a detector, got {cfg.MODEL.META_ARCHITECTURE}"
        )
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST must be one data set here, got {cfg.DATASETS.TEST}")
    return cfg


def run(args: argparse.Namespace) -> None:
    """Makes the data, trains, evaluates, and draws; ends with one line where it cannot begin."""
    times: dict[str, float] = {}
    try:
        cfg = read_settings(args)
        (dataset,) = cfg.DATASETS.TEST
        with timed(times, "data"):
            for name in (*cfg.DATASETS.TRAIN, dataset):
                DatasetCatalog.get(name)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"demo: {error}")
    with timed(times, "training and test"):
        train(args, cfg.SOLVER.MAX_ITER)
    with timed(times, "pictures"):
        cfg.MODEL.WEIGHTS = str(args.output / WEIGHTS)
        viewer = Viewer(cfg, SURE)
        pictures = picture(viewer, dataset, args.output)
    report(args, times, pictures)
    suggest(args, dataset, viewer.is_deformable)


def main(words: list[str] | None = None) -> None:
    """Runs the demo, which ends its training when it is ended."""
    args = parse_arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: ended"))
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")


if __name__ == "__main__":
    main()
