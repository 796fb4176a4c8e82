#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Compares parameters, FLOPs, activations and run time of models (Table 4).

    python tools/complexity.py --config-file configs/Shapes/rfcn_slim_plain.yaml \\
        --config-file configs/Shapes/rfcn_slim_dconv3_droi.yaml --size 128 128

Relative times are to the first model. `forward` is the model with its post-processing on an image
in memory; `total` includes reading the image file. Without --weights the weights are random. Config
keys, of all models, can be overridden at the end of the command line.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench.timing import Times, measure
from PIL import Image

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.export import TracingAdapter

from dcn_plugin.analysis.complexity import Cost, count_cost
from dcn_plugin.compat import ignore_known_warnings
from dcn_plugin.engine import config_checks, config_values, load_model, read_config
from dcn_plugin.messages import UserError, exit_on_error

HEAD = "| model | parameters, M | GFLOP | activations, M | forward, ms | total, ms | relative |"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", dest="configs", action="append", required=True, help="of a model")
    add("--weights", action="append", default=[], help="of each model, in the same order")
    add("--size", type=int, nargs=2, default=(600, 1000), metavar=("HEIGHT", "WIDTH"))
    add("--seconds", type=float, default=10.0, help="to time a model for, about")
    add("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args(words)


def configs_of(args: argparse.Namespace) -> dict[str, CfgNode]:
    """Reads and checks the configs; returns them by folder and file name."""
    if min(args.size) < 32:
        raise UserError(f"--size must be at least 32 32, got {args.size[0]} {args.size[1]}")
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds must be a finite number above 0, got {args.seconds:g}")
    if args.weights and len(args.weights) != len(args.configs):
        raise UserError(
            f"--weights must be given for each of the {len(args.configs)} models, or for none, "
            f"got {len(args.weights)}"
        )
    cfgs = {}
    for number, path in enumerate(args.configs):
        cfg = read_config(argparse.Namespace(config_file=path, opts=args.opts))
        cfg.MODEL.WEIGHTS = args.weights[number] if args.weights else ""
        config_checks.check_weights("--weights", cfg.MODEL.WEIGHTS)
        config_checks.check_no_precomputed_proposals(cfg)
        config_checks.check_device(cfg.MODEL.DEVICE)
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = min(args.size), max(args.size)
        config_values.check_values(cfg, training=False)
        name = f"{Path(path).parent.name}/{Path(path).stem}"
        again = sum(known.partition(" (")[0] == name for known in cfgs)
        cfgs[f"{name} ({again + 1})" if again else name] = cfg
    return cfgs


@torch.no_grad()
def measure_models(
    args: argparse.Namespace, cfgs: dict[str, CfgNode]
) -> tuple[dict[str, Cost], dict[tuple[str, str], Times]]:
    """Returns the cost of each model, and its "forward" and "total" times, measured in turns."""
    costs, functions = {}, {}
    pixels = np.random.default_rng(0).integers(0, 256, (*args.size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/image.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        for name, cfg in cfgs.items():
            model = load_model(cfg)
            mapper = DatasetMapper(cfg, is_train=False)
            image = mapper({"file_name": path})
            adapter = TracingAdapter(model, [{"image": image["image"]}], allow_non_tensor=True)
            costs[name] = count_cost(adapter, adapter.flattened_inputs)
            functions[name, "forward"] = partial(model, [image])
            functions[name, "total"] = lambda model=model, mapper=mapper: model(
                [mapper({"file_name": path})]
            )
        device = torch.device(cfg.MODEL.DEVICE).type
        return costs, measure(functions, device, args.seconds / 2, graphs=False)


def table(costs: dict[str, Cost], times: dict[tuple[str, str], Times]) -> str:
    """Returns a Markdown table; times are medians, relative ones those of the forward pass."""
    lines = [HEAD, "|---|---|---|---|---|---|---|"]
    reference = next(iter(times.values())).median
    for name, cost in costs.items():
        forward, total = times[name, "forward"], times[name, "total"]
        counts = f"{cost.parameters / 1e6:.2f} | {cost.flops / 1e9:.3g}"
        counts += f" | {cost.activations / 1e6:.3g}"
        spread = f"{forward.median:.1f} ± {forward.spread:.0f} % | {total.median:.1f}"
        lines.append(f"| {name} | {counts} | {spread} | {forward.median / reference:.2f} |")
    return "\n".join(lines)


@exit_on_error("complexity")
def main(words: list[str] | None = None) -> None:
    """Prints the table, and the operators that were not counted."""
    args = parse_arguments(words)
    ignore_known_warnings()
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    cfgs = configs_of(args)
    costs, times = measure_models(args, cfgs)
    print(table(costs, times))
    missed = sorted(set().union(*(cost.not_counted for cost in costs.values())))
    print(f"\n{args.size[0]} x {args.size[1]} pixels, {torch.get_num_threads()} threads;", end=" ")
    print(f"FLOPs do not include {', '.join(missed)}" if missed else "all operators counted")


if __name__ == "__main__":
    main()
