# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What a network with this project's ops costs, by fvcore's counters (Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

INTERPOLATION = 4  # products of a bilinear sample: one for each pixel around it
ADAPTIVE = 2  # samples of a bin along an axis where their number follows the size of the RoI
DEFORM_CONV, ROI_POOL = "dcn_plugin::deform_conv2d", "dcn_plugin::deform_roi_pool"

# Elementwise or without arithmetic. Norms, which fvcore counts, are among them: some networks have
# them folded into their convolutions.
ELEMENTWISE = (
    *("abs", "add", "add_", "all", "amax", "argsort", "batch_norm", "bitwise_and", "clamp"),
    *("clamp_", "clamp_min", "constant_pad_nd", "div", "div_", "eq", "exp", "fill_", "floor"),
    *("ge", "gt", "index_put_", "isfinite", "le", "log2", "lt", "max", "max_pool2d", "mean"),
    *("meshgrid", "minimum", "mul", "mul_", "ne", "neg", "nonzero_numpy", "ones_like", "pad"),
    *("reciprocal", "remainder", "repeat_interleave", "rsub", "sigmoid", "softmax", "sort"),
    *("sqrt", "sub", "sub_", "sum", "topk", "unflatten", "where", "zeros_like"),
)
NORMS = ("group_norm", "layer_norm", "instance_norm")
FREE = (*(f"aten::{name}" for name in (*ELEMENTWISE, *NORMS)), "torchvision::nms")


@dataclass(frozen=True)
class Cost:
    """Of one forward pass."""

    parameters: int
    flops: float  # a product with its sum counts once, as everywhere in fvcore
    activations: int  # numbers that convolutions and products put out
    flops_by_operator: Mapping[str, float]
    not_counted: frozenset[str]  # operators that no rule is known for


def count_cost(model: nn.Module, inputs: Any) -> Cost:
    """Counts.

    Args:
        model: any network that can be traced; a detector of Detectron2's in its `TracingAdapter`.
        inputs: a tensor, or a tuple of them.
    """
    flops = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    flops.uncalled_modules_warnings(False).tracer_warnings("none")
    flops.set_op_handle(**dict.fromkeys(FREE))
    flops.set_op_handle(DEFORM_CONV, deform_conv_flops, ROI_POOL, roi_pool_flops)
    activations = ActivationCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    activations.uncalled_modules_warnings(False).tracer_warnings("none")
    activations.set_op_handle(DEFORM_CONV, outputs_of, ROI_POOL, outputs_of)
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        flops.total(),
        int(activations.total()),
        dict(flops.by_operator()),
        frozenset(flops.unsupported_ops()),
    )


def deform_conv_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Counts a deformable convolution: its products, and a bilinear sample of each tap.

    Args:
        inputs: of the traced op: input, offset, weight, ...
        outputs: of it.
    """
    channels, weight, output = shape(inputs[0])[1], shape(inputs[2]), shape(outputs[0])
    cells, taps = prod((output[0], *output[2:])), prod(weight[2:])
    return prod(output) * prod(weight[1:]) + cells * taps * channels * INTERPOLATION


def roi_pool_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Counts a RoI pooling: the bilinear samples of each bin.

    Args:
        inputs: of the traced op, of which the eighth is sampling_ratio.
        outputs: of it.
    """
    samples = (inputs[7].toIValue() or ADAPTIVE) ** 2
    return prod(shape(outputs[0])) * samples * INTERPOLATION


def outputs_of(inputs: list[Any], outputs: list[Any]) -> int:
    """Returns how many numbers a traced op puts out."""
    return prod(shape(outputs[0]))


def shape(value: Any) -> list[int]:
    """Returns the shape of a traced tensor."""
    return value.type().sizes()
