# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Random calls of every op in eight threads; some are compared with a call in one thread."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from typing import Any

import torch

from dcn_plugin.ops import deform_conv2d
from tests.ops import conv_cases, roi_cases
from tests.ops.conv_cases import ConvCase
from tests.ops.roi_cases import MODES, RoiCase
from tests.tolerances import DTYPES

from .progress import Progress

THREADS = 8
COMPARED = 8  # one call of so many
# Layers, that is channels and kernel sizes: PyTorch keeps the GEMM kernels that oneDNN compiles for
# each layer, dtype and thread. Memory must not grow with the number of map sizes.
LAYERS = 2
_global_generator = threading.Lock()  # of PyTorch's random numbers


def run(progress: Progress, seed: int) -> None:
    """Makes calls until the time is over, at least one in each thread.

    Args:
        progress: of the part; a part of its time is left for the comparisons.
        seed: of the first call; the following calls have the numbers that follow.
    """
    digests: dict[int, str] = {}

    def work(thread: int) -> None:
        number = seed + thread
        while number < seed + THREADS or not progress.is_over(0.85):
            try:
                name, digest = call(number)
            except Exception as error:
                progress.fail(f"call {number}: {type(error).__name__}: {error}")
                return
            progress.count(name)
            if (number - seed) // THREADS % COMPARED == 0:
                digests[number] = digest
            number += THREADS

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for number, digest in sorted(digests.items()):
        if progress.is_over() and progress.counts["compared"]:
            break
        if call(number)[1] != digest:
            progress.fail(f"call {number}: its results depend on the threads")
        progress.count("compared")
    torch.set_num_threads(before)


def call(number: int) -> tuple[str, str]:
    """Runs forward and backward of a call that depends on the number only.

    Returns:
        the name of the op, and a hash of the output and all gradients.
    """
    rng = random.Random(number)
    name, function, gradients, case = _random_case(rng)
    with _global_generator:
        torch.manual_seed(number)
        arguments = case.draw(dtype=rng.choice(DTYPES))
    if rng.random() < 0.5:
        arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    output, found = gradients(function, arguments)
    digest = hashlib.sha256()
    for tensor in (output, *found.values()):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return name, digest.hexdigest()


def _random_case(rng: random.Random) -> tuple[str, Callable, Callable, Any]:
    if rng.random() < 0.5:
        return "deform_conv2d", deform_conv2d, conv_cases.gradients, _conv_case(rng)
    case = _roi_case(rng)
    names = "ps_roi_pool", "roi_pool"
    name = ("deform_" if case.classes else "") + names[case.part is None]
    return name, case.function, roi_cases.gradients, case


def _conv_case(rng: random.Random) -> ConvCase:
    def pair(low: int, high: int, rng: random.Random = rng) -> tuple[int, int]:
        return rng.randint(low, high), rng.randint(low, high)

    layer = random.Random(rng.randrange(LAYERS))
    groups, offset_groups = pair(1, 4, layer)
    channels, kernel = pair(1, 12, layer), pair(1, 4, layer)
    padding, dilation = pair(0, 3), pair(1, 3)
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + rng.randint(0, 40)
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    return ConvCase(
        batch=rng.randint(0, 3),
        in_channels=groups * offset_groups * channels[0],
        out_channels=groups * channels[1],
        size=(height, width),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        bias=rng.random() < 0.5,
        mask=rng.random() < 0.5,
    )


def _roi_case(rng: random.Random) -> RoiCase:
    def pair(high: int) -> tuple[int, int]:
        return rng.randint(1, high), rng.randint(1, high)

    scale, classes = rng.choice((1.0, 0.5, 1 / 16)), rng.randint(0, 3)
    position_sensitive = rng.random() < 0.5
    boxes = [tuple(rng.uniform(-10, 50) / scale for _ in range(4)) for _ in range(rng.randrange(9))]
    return RoiCase(
        mode=rng.choice(MODES),
        classes=classes,
        channels=max(classes, 1) * rng.randint(1, 16),
        batch=rng.randint(1, 3),
        size=pair(40),
        output=pair(7),
        part=pair(7) if position_sensitive else None,
        group=pair(4) if position_sensitive else None,
        ratio=rng.randint(0, 3),
        scale=scale,
        boxes=tuple(boxes),
    )
