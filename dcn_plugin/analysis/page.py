# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A page of HTML on which one clicks to see where a network looks: one file, no server."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from dcn_plugin.files import whole_file

from .recording import Recording, Sampled
from .sampling import MANY, last_layers, order_levels

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Shown:
    """An object on the page."""

    label: str
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels of the image
    resting: Tensor | None = None  # (bins, 4), likewise: parts without offsets
    bins: Tensor | None = None  # (bins, 4), and with them


def save_page(
    path: Path,
    title: str,
    image: np.ndarray,
    recording: Recording,
    seen: tuple[int, int],
    objects: list[Shown],
    *,
    layers: list[str] | None = None,
) -> None:
    """Saves a page.

    Args:
        path: of the HTML.
        title: on top of the page.
        image: (height, width, 3) bytes, red, green, blue.
        recording: of the network's pass over it.
        seen: height and width of the image as the network saw it, without padding.
        objects: that can be chosen; the first is at first.
        layers: to follow, as in `trace`.
    """
    height, width = image.shape[:2]
    done, encoded = cv2.imencode(".png", image[..., ::-1])
    if not done:
        raise ValueError(f"the image of {title} cannot be encoded as PNG")
    levels = []
    if recording.choose(layers):
        last_layers(recording, layers)  # to know now if these cannot be traced
        levels = order_levels(recording.choose(layers))
    flat = [(depth, name) for depth, level in enumerate(levels) for name in level]
    content = {
        "title": title,
        "image": f"data:image/png;base64,{base64.b64encode(encoded).decode()}",
        "width": width,
        "height": height,
        "size": list(seen),
        "scale": [seen[0] / height, seen[1] / width],
        "many": MANY,
        "levels": [[flat.index((d, name)) for name in level] for d, level in enumerate(levels)],
        "layers": [
            {
                **_layer(recording.layers[name]),
                "next": [flat.index((depth + 1, other)) for other in levels[depth][name]],
            }
            for depth, name in flat
        ],
        "objects": [_object(shown) for shown in objects],
    }
    text = json.dumps(content).replace("<", "\\u003c")  # no text can end the script around it
    with whole_file(path) as half:
        half.write_text(TEMPLATE.read_text().replace("__DATA__", text))


def _layer(layer: Sampled) -> dict[str, Any]:
    return {
        "name": layer.layer,
        "out": layer.out_size,
        "outGrid": {"start": layer.out_grid.start, "step": layer.out_grid.step},
        "mapGrid": {"start": layer.map_grid.start, "step": layer.map_grid.step},
        "kernel": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "offset": _numbers(layer.offset[0]),
        "mask": None if layer.mask is None else _numbers(layer.mask[0]),
    }


def _object(shown: Shown) -> dict[str, Any]:
    parts = None
    if shown.bins is not None and shown.resting is not None:
        parts = {"bins": _rounded(shown.bins), "resting": _rounded(shown.resting)}
    return {"label": shown.label, "box": [round(v, 2) for v in shown.box], "parts": parts}


def _rounded(boxes: Tensor) -> list[list[float]]:
    return [[round(value, 2) for value in box] for box in boxes.tolist()]


def _numbers(tensor: Tensor) -> str:
    little = tensor.detach().cpu().contiguous().numpy().astype("<f4")
    return base64.b64encode(little.tobytes()).decode()
