# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Parameters, FLOPs and activations of models with deformable ops, by fvcore (Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from torch import nn

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import generic_activation_jit, get_shape

INTERPOLATION = 4  # multiply-adds of a bilinear sample
ADAPTIVE = 2  # assumed samples of a bin along an axis if their number depends on the RoI

# Not counted: elementwise ops and those without arithmetic; and norms, which fvcore counts, since
# FrozenBatchNorm2d can be folded into convolutions.
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
    """Cost of one forward pass."""

    parameters: int
    flops: float  # multiply-adds, as everywhere in fvcore
    activations: int  # elements of the outputs of convolutions and matrix multiplications
    flops_by_operator: Mapping[str, float]
    not_counted: frozenset[str]  # operators without a rule


def count_cost(model: nn.Module, inputs: Any) -> Cost:
    """Counts the cost of a model.

    Args:
        model: any model that can be traced; a Detectron2 detector in its `TracingAdapter`.
        inputs: a tensor, or a tuple of tensors.
    """
    flops = FlopCountAnalysis(model, inputs).set_op_handle(**dict.fromkeys(FREE), **HANDLES)
    activations = ActivationCountAnalysis(model, inputs)
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.tracer_warnings("none")
    activations.set_op_handle(**dict.fromkeys(HANDLES, generic_activation_jit()))
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        flops.total(),
        int(activations.total()),
        dict(flops.by_operator()),
        frozenset(flops.unsupported_ops()),
    )


def deform_conv_flops(inputs: list[Any], outputs: list[Any], weight_at: int) -> int:
    """Counts the GEMM of a deformable convolution and a bilinear sample for each tap.

    Args:
        inputs: of the traced op; the first is the feature map.
        outputs: of the traced op.
        weight_at: index of the weight among the inputs.
    """
    input, weight, output = map(get_shape, (inputs[0], inputs[weight_at], outputs[0]))
    positions, taps = prod((output[0], *output[2:])), prod(weight[2:])
    return prod(output) * prod(weight[1:]) + positions * taps * input[1] * INTERPOLATION


def roi_pool_flops(inputs: list[Any], outputs: list[Any], ratio_at: int) -> int:
    """Counts the bilinear samples of the bins of a RoI pooling.

    Args:
        inputs: of the traced op.
        outputs: of the traced op.
        ratio_at: index of sampling_ratio among the inputs.
    """
    ratio = inputs[ratio_at].toIValue()
    return prod(get_shape(outputs[0])) * (ratio if ratio > 0 else ADAPTIVE) ** 2 * INTERPOLATION


HANDLES = {
    "dcn_plugin::deform_conv2d": partial(deform_conv_flops, weight_at=2),
    "torchvision::deform_conv2d": partial(deform_conv_flops, weight_at=1),
    # Detectron2's autograd functions, as the tracer names them.
    "prim::PythonOp._DeformConv": partial(deform_conv_flops, weight_at=2),
    "prim::PythonOp._ModulatedDeformConv": partial(deform_conv_flops, weight_at=3),
    "dcn_plugin::deform_roi_pool": partial(roi_pool_flops, ratio_at=7),
    "torchvision::roi_align": partial(roi_pool_flops, ratio_at=5),
}
