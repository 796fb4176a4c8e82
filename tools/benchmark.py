#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Times the ops and models, and other libraries and the plain convolution beside them.

    python tools/benchmark.py [--only conv roi nets] [--threads 1 2] [--json FILE]

The results of a case's implementations are compared first. Then the implementations take turns, so
that a change of the machine's speed affects them all. The exit status is 1 if results differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from bench import cases, memory, nets, onnx_runtime, table
from bench.cases import Setting
from bench.runner import Case, Runner
from tqdm import tqdm

from dcn_plugin.messages import exit_on_error

KINDS = ("conv", "roi", "nets")
DEFAULT_DTYPES = {
    "cpu": ("float32", "bfloat16"),
    "cuda": ("float32", "tf32", "float16", "bfloat16"),
}


def positive(text: str) -> int:
    """Parses a positive integer."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line; fills in the defaults that depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=tuple(DEFAULT_DTYPES), help="default: cuda if available"
    )
    parser.add_argument("--threads", type=positive, nargs="+", help="default: 1 and all")
    parser.add_argument("--dtypes", choices=tuple(cases.DTYPES), nargs="+")
    parser.add_argument(
        "--batches", type=positive, nargs="+", help="of the convolutions; default: the layer's"
    )
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--skip", choices=KINDS, nargs="+", default=(), metavar="KIND")
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="NAME", help="implementations to leave out"
    )
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="per row, after the minimum of 3 turns"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--quick", action="store_true", help="one small case of each kind")
    options = parser.parse_args(arguments)
    if not 0 <= options.seconds < math.inf:
        parser.error(f"--seconds must be a finite number, 0 or more, got {options.seconds:g}")
    gpu = torch.cuda.is_available()
    options.device = options.device or ("cuda" if gpu else "cpu")
    every = torch.get_num_threads()
    default_threads = [every] if options.device == "cuda" else [1, every]
    options.threads = sorted(set(options.threads or default_threads))
    options.dtypes = options.dtypes or DEFAULT_DTYPES[options.device]
    options.batches = sorted(set(options.batches or ()))
    # float32 first: the other dtypes are compared with it.
    options.dtypes = [dtype for dtype in cases.DTYPES if dtype in options.dtypes]
    options.kinds = [kind for kind in KINDS if kind in options.only and kind not in options.skip]
    check_device(options)
    return options


def check_device(options: argparse.Namespace) -> None:
    """Exits with a message if this machine does not support the options."""
    if options.device == "cpu" and "tf32" in options.dtypes:
        sys.exit("benchmark: --dtypes tf32: only GPUs support it")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("benchmark: --device cuda: PyTorch finds no GPU")
        op = "dcn_plugin::deform_conv2d"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
            sys.exit("benchmark: --device cuda: the CUDA kernels are not compiled (make setup)")


def plan(options: argparse.Namespace) -> Iterator[tuple[Case, Setting]]:
    """Yields all measurements; those of the dtypes of a case are consecutive."""
    quick = options.quick
    lists: dict[str, tuple[Case, ...]] = {
        "conv": cases.QUICK_CONV_CASES if quick else cases.CONV_CASES,
        "roi": cases.QUICK_ROI_CASES if quick else cases.ROI_CASES,
        "nets": nets.QUICK_NETS if quick else nets.NETS,
    }
    # RoI pooling has no GEMM that tf32 could round.
    dtypes_of = {"nets": nets.NET_DTYPES, "roi": set(cases.DTYPES) - {"tf32"}}
    for kind in options.kinds:
        for case in (case for case in lists[kind] if options.match in case.name):
            batches = options.batches if kind == "conv" else []
            for batch in batches or [case.batch]:
                for threads in options.threads:
                    for dtype in options.dtypes:
                        if dtype in dtypes_of.get(kind, cases.DTYPES):
                            yield case, Setting(options.device, dtype, threads, batch)


@exit_on_error("benchmark")
def main(arguments: list[str] | None = None) -> None:
    """Runs the measurements and prints the table."""
    options = parse(arguments)
    if "nets" in options.kinds and importlib.util.find_spec("detectron2") is None:
        options.kinds.remove("nets")
        print("Detectron2 is not installed: models are skipped", file=sys.stderr)
    if "conv" in options.kinds and options.device == "cpu" and not onnx_runtime.installed():
        print("ONNX Runtime 1.25 or later is not installed: it is not timed", file=sys.stderr)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True  # the plain convolution's best kernel
    jobs = list(plan(options))
    if not jobs:
        sys.exit("benchmark: no case matches --only, --skip, --match and --dtypes")
    shown = sys.stderr.isatty()
    with (
        memory.cpu_process() if options.device == "cpu" else nullcontext() as ask,
        tqdm(total=len(jobs), unit="case", leave=False, disable=not shown) as progress,
    ):

        def say(text: str) -> None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

        runner = Runner(options, ask, say)
        runner.begin()
        for case, setting in jobs:
            progress.set_description(table.title(case.name, setting))
            runner.run(case, setting)
            progress.update()
        runner.end()
    if any(problem.differs for problem in runner.problems):
        sys.exit("benchmark: results differ, see above")


if __name__ == "__main__":
    main()
