# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What a network with this project's ops costs, by fvcore's counters (Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import nn

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

INTERPOLATION = 4  # products of a bilinear sample: one for each pixel around it
ADAPTIVE = 2  # samples of a bin along an axis where their number follows the size of the RoI

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
    flops.set_op_handle(**HANDLES)
    activations = ActivationCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    activations.uncalled_modules_warnings(False).tracer_warnings("none")
    activations.set_op_handle(**dict.fromkeys(HANDLES, outputs_of))
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        flops.total(),
        int(activations.total()),
        dict(flops.by_operator()),
        frozenset(flops.unsupported_ops()),
    )


def deform_conv_flops(inputs: list[Any], outputs: list[Any], weight_at: int) -> int:
    """Counts a deformable convolution: its products, and a bilinear sample of each tap.

    Args:
        inputs: of the traced op, of which the first is a map.
        outputs: of it.
        weight_at: which of the inputs is the weight.
    """
    channels, weight, output = shape(inputs[0])[1], shape(inputs[weight_at]), shape(outputs[0])
    cells, taps = prod((output[0], *output[2:])), prod(weight[2:])
    return prod(output) * prod(weight[1:]) + cells * taps * channels * INTERPOLATION


def roi_pool_flops(inputs: list[Any], outputs: list[Any], ratio_at: int) -> int:
    """Counts a RoI pooling: the bilinear samples of each bin.

    Args:
        inputs: of the traced op.
        outputs: of it.
        ratio_at: which of the inputs is the number of samples along an axis, adaptive below 1.
    """
    ratio = inputs[ratio_at].toIValue()
    return prod(shape(outputs[0])) * (ratio if ratio > 0 else ADAPTIVE) ** 2 * INTERPOLATION


def outputs_of(inputs: list[Any], outputs: list[Any]) -> int:
    """Returns how many numbers a traced op puts out."""
    return prod(shape(outputs[0]))


def shape(value: Any) -> list[int]:
    """Returns the shape of a traced tensor."""
    return value.type().sizes()


HANDLES = {
    "dcn_plugin::deform_conv2d": partial(deform_conv_flops, weight_at=2),
    "torchvision::deform_conv2d": partial(deform_conv_flops, weight_at=1),
    # Detectron2's, as the tracer names its functions.
    "prim::PythonOp._DeformConv": partial(deform_conv_flops, weight_at=2),
    "prim::PythonOp._ModulatedDeformConv": partial(deform_conv_flops, weight_at=3),
    "dcn_plugin::deform_roi_pool": partial(roi_pool_flops, ratio_at=7),
    "torchvision::roi_align": partial(roi_pool_flops, ratio_at=5),
}
