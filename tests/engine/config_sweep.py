# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains small models with about ten senseless values of every config key, and counts the answers.

    python -m tests.engine.config_sweep [--every 20] [--only SOLVER] [--list]

Each case is a process of its own that reads and checks the config, builds the model, trains two
iterations and evaluates. It ends with one line ("error"), with a loss that is not finite
("diverges"), with a traceback, or it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detectron2.config import CfgNode
from detectron2.engine import default_setup

from dcn_plugin.engine import Trainer, UserError, check_config, read_config
from tests import datasets
from tests.modeling.networks import network_config

NAN, INF = float("nan"), float("inf")
MEMORY = 12 << 30
SECONDS = 60

FPN = {
    "MODEL.BACKBONE.NAME": "build_deform_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.CONV_DIMS": [-1],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [96]],
}
CASCADE = {
    **FPN,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.DEFORM": False,
    "MODEL.MASK_ON": True,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
}
RETINANET = {
    **FPN,
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_deform_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 2,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 30,
    "MODEL.ROI_BOX_HEAD.DEFORM": False,
}
# The four architectures of the paper, and others of Detectron2 on our backbones.
NETWORKS: dict[str, tuple[str, dict[str, object]]] = {
    "faster_rcnn": ("faster_rcnn", {}),
    "rfcn": ("rfcn", {}),
    "ca_rpn": ("ca_rpn", {}),
    "deeplab": ("deeplab", {}),
    "fpn": ("faster_rcnn", FPN),
    "cascade": ("faster_rcnn", CASCADE),
    "retinanet": ("faster_rcnn", RETINANET),
}
# Which of them are tried, by the longest prefix of a key.
READ_BY = {
    "": ("rfcn",),
    "INPUT": ("rfcn", "deeplab"),
    "TEST": ("rfcn", "deeplab"),
    "MODEL": ("rfcn", "deeplab"),
    "MODEL.BACKBONE": ("rfcn", "fpn"),
    "MODEL.RESNETS": ("rfcn", "fpn"),
    "MODEL.FPN": ("fpn", "retinanet"),
    "MODEL.ANCHOR_GENERATOR": ("rfcn", "fpn", "retinanet"),
    "MODEL.RPN": ("rfcn", "fpn", "ca_rpn"),
    "MODEL.ROI_HEADS": ("rfcn", "faster_rcnn", "cascade", "ca_rpn"),
    "MODEL.ROI_BOX_HEAD": ("rfcn", "faster_rcnn", "cascade"),
    "MODEL.ROI_BOX_CASCADE_HEAD": ("cascade",),
    "MODEL.ROI_MASK_HEAD": ("cascade",),
    "MODEL.RETINANET": ("retinanet",),
    "MODEL.SEM_SEG_HEAD": ("deeplab",),
}


class Case(NamedTuple):
    """A value of a key of one of the networks."""

    network: str
    key: str
    value: Any


def network_file(name: str, folder: Path, detection: str, segmentation: str) -> str:
    """Writes the config of a small model that trains for two iterations; returns its path.

    Args:
        name: of `NETWORKS`.
        folder: to write to; the model's OUTPUT_DIR is in it.
        detection: data set of the detectors, with two classes.
        segmentation: data set of DeepLab, with two classes.
    """
    network, keys = NETWORKS[name]
    data = segmentation if name == "deeplab" else detection
    shared = {
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "DATASETS.TRAIN": (data,),
        "DATASETS.TEST": (data,),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (1,),
        "SOLVER.WARMUP_ITERS": 1,
        "SEED": 1,
        "OUTPUT_DIR": str(folder / "output"),
    }
    cfg = network_config(network, True, classes=2)
    cfg.merge_from_list([part for pair in {**shared, **keys}.items() for part in pair])
    path = folder / f"{name}.yaml"
    path.write_text(cfg.dump())
    return str(path)


def all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all dotted keys and their values."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from all_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def senseless(value: Any) -> list[Any]:
    """Returns values of other types, and those of the same type that are out of range."""
    others: list[Any] = [None, [], "abc", ["a"], 0, -1, NAN, {}]
    if isinstance(value, list | tuple):
        items = list(value)
        others += [[0], [-1], [NAN], [None], [[]], [["a"]], [10**9]]
        if items:
            others += [items[::-1], items[:-1], items * 2, [0] * len(items), ["a", *items[1:]]]
    elif isinstance(value, str):
        others += ["", "../nothing"]
    elif isinstance(value, float) or value is None:
        others += [-1.0, 0.0, 2.0, 1e30, INF]
    elif not isinstance(value, bool):
        others += [10**20, 0.5]
    return [other for other in others if other != value]


def cases(cfgs: dict[str, CfgNode]) -> list[Case]:
    """Returns all cases.

    Args:
        cfgs: the configs of `NETWORKS`.
    """
    found = []
    for key, _ in all_keys(cfgs["rfcn"]):
        prefix = max((p for p in READ_BY if key.startswith(p)), key=len)
        for network in READ_BY[prefix]:
            values = dict(all_keys(cfgs[network]))
            found += [Case(network, key, value) for value in senseless(values[key])]
    return found


def answer(file: str, case: Case) -> tuple[str, str]:
    """Reads, checks, builds, trains and evaluates; returns the kind of the answer, and its text."""
    args = argparse.Namespace(config_file=file, opts=[case.key, case.value], eval_only=False)
    try:
        cfg = read_config(args)
        check_config(cfg, training=True, stock_trainer=True)
        cfg.freeze()
        default_setup(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    except UserError as error:
        return "error", str(error)
    except FloatingPointError as error:  # train_net.py ends after the report in the log
        return "diverges", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    return "runs", ""


def answer_in_process(file: str, case: Case) -> tuple[str, str]:
    """Runs `answer` in a process with limits of memory and time, and without output."""
    context = multiprocessing.get_context("fork")  # which has imported everything
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            sender.send(answer(file, case))

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "traceback", "the process was killed, for its memory or its time"
    finally:
        process.join()


def sweep(every: int = 1, start: int = 0, only: str = "") -> Iterator[tuple[Case, str, str]]:
    """Yields cases and their answers.

    Args:
        every: one of so many cases.
        start: the first.
        only: prefix of the keys.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        detection = stack.enter_context(datasets.tiny_coco(folder / "coco", 2))
        panoptic = stack.enter_context(datasets.tiny_panoptic(folder / "panoptic", 2))
        segmentation = panoptic.replace("_separated", "_stuffonly")
        files = {n: network_file(n, folder, detection, segmentation) for n in NETWORKS}
        cfgs = {
            n: read_config(argparse.Namespace(config_file=file, opts=[]))
            for n, file in files.items()
        }
        found = [case for case in cases(cfgs) if case.key.startswith(only)]
        for case in found[start::every]:
            yield case, *answer_in_process(files[case.network], case)


def main() -> None:
    """Prints the counts, and with --list all cases that end with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="try one of so many cases")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--only", default="", help="prefix of the keys")
    parser.add_argument("--json", help="write all answers to this file, one per line")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    with open(args.json or os.devnull, "w") as file:
        for case, kind, text in sweep(args.every, args.start, args.only):
            counts[kind] += 1
            print(json.dumps([*case, kind, text], default=str), file=file, flush=True)
            if kind == "traceback":
                print(f"{case.network}: {case.key} {case.value!r}: {' '.join(text.split())[:200]}")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))


if __name__ == "__main__":
    sys.exit(main())
