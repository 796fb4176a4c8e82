#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Compares what networks cost: parameters, FLOPs, activations, times (Table 4).

    python tools/complexity.py --config-file configs/Shapes/rfcn_slim_plain.yaml \
        --config-file configs/Shapes/rfcn_slim_dconv3_droi.yaml --size 128 128

The first network is what the others are compared with. `forward` is the network with its
post-processing on an image that is ready, `total` from the file of the image on. Networks without
weights have random ones. Keys of the config, for all of them, can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.nets import build
from bench.timing import Times, measure
from PIL import Image
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.export import TracingAdapter

from dcn_plugin.analysis.cost import Cost, count_cost
from dcn_plugin.compat import ignore_known_warnings
from dcn_plugin.engine import lay_out, load_network, read_config
from dcn_plugin.engine.settings import check_device, check_weights, refuse_proposals

HEAD = "| network | parameters, M | GFLOP | activations, M | forward, ms | total, ms | relative |"


@dataclass(frozen=True)
class Row:
    """One network."""

    name: str
    cost: Cost
    forward: Times
    total: Times


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", dest="configs", action="append", required=True, help="of a network")
    add("--weights", action="append", default=[], help="of each network, in the same order")
    add("--size", type=int, nargs=2, default=(600, 1000), metavar=("HEIGHT", "WIDTH"))
    add("--seconds", type=float, default=10.0, help="to time a network for, about")
    add("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


def configs_of(args: argparse.Namespace) -> dict[str, CfgNode]:
    """Reads and checks the configs; returns them by their folders and files."""
    if min(args.size) < 32:
        raise ValueError(f"--size must be at least 32 32, got {args.size[0]} {args.size[1]}")
    if args.weights and len(args.weights) != len(args.configs):
        raise ValueError(
            f"--weights must be given for each of the {len(args.configs)} networks, or for none, "
            f"got {len(args.weights)}"
        )
    found = {}
    for number, path in enumerate(args.configs):
        cfg = read_config(argparse.Namespace(config_file=path, opts=args.opts))
        cfg.MODEL.WEIGHTS = args.weights[number] if args.weights else ""
        check_weights("--weights", cfg.MODEL.WEIGHTS)
        refuse_proposals(cfg)
        check_device(cfg.MODEL.DEVICE)
        # As it is, without another resizing.
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min(args.size), max(args.size)
        name = f"{Path(path).parent.name}/{Path(path).stem}"
        again = sum(known.partition(" (")[0] == name for known in found)
        found[f"{name} ({again + 1})" if again else name] = cfg
    return found


def network(cfg: CfgNode) -> nn.Module:
    """Builds a network, with weights if there are some."""
    if cfg.MODEL.WEIGHTS:
        return load_network(cfg)
    return lay_out(cfg, build(cfg)).eval()


def write_image(folder: Path, size: tuple[int, int]) -> Path:
    """Writes an image with nothing in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    path = folder / "image.jpg"
    Image.fromarray(pixels).save(path, quality=90)
    return path


def steps_of(
    model: nn.Module, read: Callable[[], dict[str, Any]]
) -> dict[str, Callable[[], object]]:
    """Returns what is timed: the network alone, and with the reading of the image."""
    ready = [read()]

    @torch.no_grad()
    def forward() -> object:
        return model(ready)

    @torch.no_grad()
    def total() -> object:
        return model([read()])

    return {"forward": forward, "total": total}


def measure_networks(args: argparse.Namespace, cfgs: dict[str, CfgNode]) -> list[Row]:
    """Counts and times all networks, these in turns."""
    costs, functions = {}, {}
    device = ""
    with tempfile.TemporaryDirectory() as folder:
        path = write_image(Path(folder), tuple(args.size))
        for name, cfg in cfgs.items():
            model = network(cfg)
            device = torch.device(cfg.MODEL.DEVICE).type
            read = partial(DatasetMapper(cfg, is_train=False), {"file_name": str(path)})
            image = [{"image": read()["image"]}]
            with torch.no_grad():
                adapter = TracingAdapter(model, image, allow_non_tensor=True)
                costs[name] = count_cost(adapter, adapter.flattened_inputs)
            for kind, step in steps_of(model, read).items():
                functions[name, kind] = step
        times = measure(functions, device, args.seconds / 2, graphs=False)
    return [Row(name, costs[name], times[name, "forward"], times[name, "total"]) for name in cfgs]


def table(rows: list[Row]) -> str:
    """Returns the rows in Markdown; times are medians, and relative ones those of `forward`."""
    lines = [HEAD, "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            row.name,
            f"{row.cost.parameters / 1e6:.2f}",
            f"{row.cost.flops / 1e9:.3g}",
            f"{row.cost.activations / 1e6:.3g}",
            f"{row.forward.median:.1f} ± {row.forward.spread:.0f} %",
            f"{row.total.median:.1f}",
            f"{row.forward.median / rows[0].forward.median:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Prints the table, and what was not counted."""
    args = parse_arguments(words)
    ignore_known_warnings()
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    try:
        cfgs = configs_of(args)
        rows = measure_networks(args, cfgs)
    except (OSError, ValueError) as error:
        sys.exit(f"complexity: {error}")
    print(table(rows))
    missed = sorted(set().union(*(row.cost.not_counted for row in rows)))
    print(f"\n{args.size[0]} x {args.size[1]} pixels, {torch.get_num_threads()} threads;", end=" ")
    print(f"FLOPs without {', '.join(missed)}" if missed else "FLOPs of all products")


if __name__ == "__main__":
    main()
