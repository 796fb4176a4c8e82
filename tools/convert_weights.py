#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Converts weights of other projects to Detectron2's names and layout, and back.

    python tools/convert_weights.py dcn_r50.pth converted.pth
    python tools/convert_weights.py model_final.pth mmdet.pth --to mmdetection

Reads files of MMDetection 1 to 3 (ResNet and ResNeXt with deformable convolution, FPN, RPN, and the
heads of Faster, Mask and Cascade R-CNN), torchvision and timm (ResNets), and Detectron2. They are
loaded by train_net.py as they are; converted files are for Detectron2's own scripts, and for those
projects.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcn_plugin.engine import Checkpointer
from dcn_plugin.engine.checkpoint import count_by_module, input_config
from dcn_plugin.engine.weight_conversion import CONVERTED_BY, Origin, state_dict_of, to_detectron2
from dcn_plugin.engine.weight_names import to_mmdet, to_torchvision
from dcn_plugin.files import atomic_write
from dcn_plugin.messages import UserError, exit_on_error


@exit_on_error("convert_weights")
def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="a file, or an address such as torchvision://…")
    parser.add_argument("output", type=Path, help="the file to write, such as converted.pth")
    projects = ["detectron2", "mmdetection", "torchvision"]
    parser.add_argument("--to", choices=projects, default=projects[0], help="default: detectron2")
    args = parser.parse_args()
    if args.output.is_dir() or args.output == Path(args.input):
        parser.error(f"output must be another file, got {args.output}")
    content = Checkpointer(nn.Identity()).read(args.input)
    try:
        converted = convert(content, args.to)
    except UserError as error:
        raise UserError(f"{args.input}: {error}") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as temporary, temporary.open("wb") as file:
        torch.save(converted, file)
    print(f"Written: {args.output}")


def convert(checkpoint: dict[str, Any], to: str) -> dict[str, Any]:
    """Returns the content of a checkpoint in the form of another project; prints what was done.

    Args:
        checkpoint: as `Checkpointer.read` returns it.
        to: "detectron2", "mmdetection" or "torchvision".

    Raises:
        ValueError: if no key is renamed.
    """
    weights, origin = to_detectron2(checkpoint)
    if to == "detectron2":
        report(state_dict_of(checkpoint)[0], weights)
        print_config(origin)
        # Detectron2's heuristics find the prefix of a backbone alone.
        return {
            "model": weights,
            "__author__": CONVERTED_BY,
            "matching_heuristics": not any(key.startswith("backbone.") for key in weights),
            "origin": asdict(origin),
        }
    if to == "torchvision":
        converted = to_torchvision(weights)
        report(weights, converted)
        return converted
    converted = to_mmdet(weights)
    report(weights, converted)
    print(
        "MMDetection's config must have the target_stds 1 / BBOX_REG_WEIGHTS, style='caffe' for "
        "STRIDE_IN_1X1 True, and the mean, std and bgr_to_rgb of the input format"
    )
    return {"state_dict": converted, "meta": {}}


def report(before: Iterable[str], after: Iterable[str]) -> None:
    """Prints how many keys were renamed, and which were not; ValueError if none was."""
    kept = set(before) & set(after)
    renamed = set(after) - kept
    if not renamed:
        raise UserError(
            "no key has a name that can be converted (train_net.py loads Detectron2's and Caffe2's "
            f"files as they are); keys: {', '.join(sorted(kept)[:3]) or 'none'}"
        )
    print(f"{len(renamed)} keys were renamed")
    if kept:
        print(f"{len(kept)} keys were not converted (unknown modules): {count_by_module(kept)}")


def print_config(origin: Origin) -> None:
    """Prints the config that the model of the weights needs."""
    keys = []
    if origin.stride_in_1x1 is not None:
        keys.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {origin.stride_in_1x1}")
    if origin.input_format:
        keys.append(input_config(origin))
    weights = [tuple(round(1 / std, 4) for std in stds) for stds in origin.box_stds]
    if len(weights) == 1:
        keys.append(f"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS {weights[0]}")
    elif weights:
        keys.append(f"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS {tuple(weights)}")
    for key in keys:
        print(f"Set {key}")


if __name__ == "__main__":
    main()
