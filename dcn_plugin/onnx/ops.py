# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""ONNX translations of the ops. Requires onnxscript."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import onnxscript
import torch
from onnxscript import evaluator
from onnxscript.ir import DataType
from onnxscript.onnx_types import TensorType

# The exporter reads the types of the arguments: tensors are inputs, the others attributes. That of
# PyTorch 2.6 knows no `|`.
OptionalTensor = Optional[TensorType]  # noqa: UP045

# PyTorch 2.6 translates at opset 18 whatever is asked for, and converts the model afterwards.
TRANSLATES_AT_TARGET = [int(number) for number in torch.__version__.split(".")[:2]] >= [2, 11]


def deform_conv2d(
    input: TensorType,
    offset: TensorType,
    weight: TensorType,
    bias: OptionalTensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: OptionalTensor,
) -> TensorType:
    """Translates the op to DeformConv, which has one dtype: other inputs are cast.

    Args:
        input: the arguments of the op.
        offset: as above.
        weight: as above.
        bias: as above.
        stride: as above.
        padding: as above.
        dilation: as above.
        mask: as above.
    """
    tensors = [input, weight, offset, bias, mask]  # the order of DeformConv
    dtypes = {t.dtype for t in tensors if t is not None}
    op = onnxscript.opset22 if dtypes == {DataType.BFLOAT16} else onnxscript.opset19
    target = evaluator.default().opset.version  # of the model, at least 18
    if TRANSLATES_AT_TARGET and target < op.version:
        raise ValueError(
            f"deform_conv2d: DeformConv of {input.dtype.name} needs opset {op.version} or later, "
            f"got {target}; call torch.onnx.export(..., opset_version={op.version})"
        )
    dtype = input.dtype
    if len(dtypes) > 1:
        dtype = DataType.DOUBLE if DataType.DOUBLE in dtypes else DataType.FLOAT
        tensors = [t if t is None else op.Cast(t, to=dtype) for t in tensors]
    kernel = weight.shape[2:]
    output = op.DeformConv(
        *tensors,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=input.shape[1] // weight.shape[1],
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
    )
    return output if dtype == input.dtype else op.Cast(output, to=input.dtype)


def deform_roi_pool(
    input: TensorType,
    boxes: TensorType,
    offset: OptionalTensor,
    output_size: Sequence[int],
    part_size: Sequence[int],
    group_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    mode: str,
) -> TensorType:
    """Rejects RoI pooling in a program: ATen ops have to replace it before the translation.

    Args:
        input: the arguments of the op.
        boxes: as above.
        offset: as above.
        output_size: as above.
        part_size: as above.
        group_size: as above.
        spatial_scale: as above.
        sampling_ratio: as above.
        gamma: as above.
        mode: as above.
    """
    raise NotImplementedError(
        "deform_roi_pool: the translation table has no RoI pooling; replace it in the program by "
        "program.run_decompositions(dcn_plugin.onnx.decompositions), or export the module with a "
        "PyTorch that has torch.onnx.ops"
    )
