# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""An HTML page that shows the sampling locations of the output position that one clicks on.

The traces of all positions are computed here and embedded; the script of the page only draws them.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from dcn_plugin.files import atomic_write

from .effective_dilation import dilation_map
from .recording import Recording
from .trace import last_layers, order_levels, trace

TEMPLATE = Path(__file__).with_name("html_page.html")
LEVELS = 3  # last levels of deformable layers that are traced through
MAX_BYTES = 5_000_000  # of a page
MAX_POSITIONS = 2500  # to click on; a trace takes milliseconds
MAX_SIDE = 1600  # pixels of the embedded image


@dataclass(frozen=True)
class PageObject:
    """An object to choose on the page; boxes in pixels of the model's input."""

    label: str
    box: tuple[float, ...]  # x1, y1, x2, y2
    undeformed: Tensor | None = None  # (bins, 4), RoI bins without offsets
    bins: Tensor | None = None  # (bins, 4), moved by the offsets


def save_page(
    path: Path,
    title: str,
    image: np.ndarray,
    recording: Recording,
    size: tuple[int, int],
    objects: list[PageObject],
    *,
    layers: list[str] | None = None,
) -> None:
    """Saves a page of at most MAX_BYTES.

    Args:
        path: of the HTML file.
        title: heading of the page.
        image: (H, W, 3) uint8 RGB, which is stretched to the size of the model's input.
        recording: of the forward pass on it.
        size: height and width of the model's input, without padding.
        objects: to choose from; the first is chosen at the start.
        layers: to trace through, as in `trace`, of which the last three levels are shown.
    """
    content: dict[str, Any] = {"title": title, "image": _data_url(image), "size": size}
    content["objects"] = [_object(each) for each in objects]
    content["levels"] = []
    html = TEMPLATE.read_text()
    if recording.choose(layers):
        last_layers(recording, layers)  # raises if they cannot be traced
        budget = MAX_BYTES - len(html) - len(_script_json(content))
        content |= _traces(recording, layers, size, budget)
    with atomic_write(path) as half:
        half.write_text(html.replace("__DATA__", _script_json(content)))


def _traces(
    recording: Recording, layers: list[str] | None, size: tuple[int, int], budget: int
) -> dict[str, Any]:
    """Returns the traces of as many evenly spaced output positions as fit into a budget."""
    levels = order_levels(recording.choose(layers))[:LEVELS]
    layers = list({name: None for level in levels for name in level})
    last = last_layers(recording, layers)[0]
    dilation = dilation_map(last)
    unit = max(size) / 2**14  # pixels; int16 reaches to twice the image
    # Positions whose centres are on the image, not on its padding.
    inside = [
        ceil(pixels / stride) for pixels, stride in zip(size, last.output_stride, strict=True)
    ]
    step = ceil(sqrt(inside[0] * inside[1] / MAX_POSITIONS))
    while True:
        axes = [range(min(step // 2, (n - 1) // 2), n, step) for n in inside]
        positions = [(row, column) for row in axes[0] for column in axes[1]]
        # Merging locations changes no picture, and keeps offset groups from filling the page.
        traces = [trace(recording, at, layers=layers, merge_above=0) for at in positions]
        pairs = [pair for each in traces for pair in zip(each.levels, each.weights, strict=True)]
        points = [(locations.cpu().numpy() / unit).round() for locations, _ in pairs]
        alphas = [_opacity(weights) for _, weights in pairs]
        content = {
            "levels": [list(level) for level in levels],
            "rows": [(row, row * last.output_stride[0]) for row in axes[0]],
            "columns": [(column, column * last.output_stride[1]) for column in axes[1]],
            "dilation": [round(float(dilation[at]), 2) for at in positions],
            "unit": unit,
            # By position and level: how many locations; (y, x) in units; weights as opacities.
            "counts": _base64(np.array([len(each) for each in points]), "<u4"),
            "points": _base64(np.concatenate(points).clip(-(2**15), 2**15 - 1), "<i2"),
            "alphas": _base64(np.concatenate(alphas), "u1"),
        }
        if len(_script_json(content)) <= budget or len(positions) == 1:
            return content
        step += 1


def _object(shown: PageObject) -> dict[str, Any]:
    boxes = [torch.tensor(shown.box)]
    if shown.bins is not None and shown.undeformed is not None:
        boxes += [shown.undeformed, shown.bins]
    box, *bins = (each.double().round(decimals=2).tolist() for each in boxes)
    return {"label": shown.label, "box": box, "bins": bins}


def _opacity(weights: Tensor) -> np.ndarray:
    weights = weights.cpu().numpy()
    return (255 * weights / weights.max(initial=1e-6)).round()


def _data_url(image: np.ndarray) -> str:
    shrink = MAX_SIDE / max(image.shape[:2])
    if shrink < 1:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return f"data:image/jpeg;base64,{_base64(encoded, 'u1')}"


def _base64(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _script_json(content: dict[str, Any]) -> str:
    return json.dumps(content).replace("<", "\\u003c")  # no text can end the script around it
