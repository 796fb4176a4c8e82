# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Stride of each feature map, and the deformable layers it depends on, tracked during a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Stride = tuple[int, int]
WINDOW_OPS = ("convolution", "max_pool2d_with_indices", "avg_pool2d")
# Ops that, like pointwise ones and norms, leave every position where it is if they keep H and W.
SAME_POSITIONS = {
    *("alias", "cat", "clone", "copy", "detach", "slice", "split", "split_with_sizes", "to_copy"),
    *("native_dropout", "hardswish", "hardtanh", "leaky_relu"),  # pointwise, but not tagged so
}


@dataclass(frozen=True)
class Source:
    """What a tensor was computed from."""

    layers: frozenset[str] = frozenset()  # deformable layers
    # Of a feature map: position (i, j) is centred on pixel (i * stride[0], j * stride[1]).
    stride: Stride | None = None
    unknown: str = "is not computed from the image"  # why there is no stride


def strided(source: Source, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Source:
    """Returns the source of a convolution's or pooling's output, given that of its input."""
    if source.stride is None:
        return source
    kernel, stride, padding, dilation = map(pair, (kernel, stride, padding, dilation))
    if any(2 * p != d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True)):
        wrong = (
            f"is computed with kernel {kernel}, padding {padding} and dilation {dilation}; only "
            "odd kernels with padding dilation * (kernel - 1) / 2 are supported"
        )
        return replace(source, stride=None, unknown=wrong)
    rows, columns = source.stride
    return replace(source, stride=(rows * stride[0], columns * stride[1]))


def pair(value: int | Sequence[int]) -> Stride:
    """Returns (rows, columns) of a number, or of a sequence of one or two."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


class Dataflow(TorchDispatchMode):
    """Tracks the source of every tensor computed from the image.

    Strides multiply where a convolution or pooling has an odd kernel and "same" padding; pointwise
    ops, norms and copies keep them. After any other op the stride is unknown.
    """

    def __init__(self) -> None:
        """Starts without any tensor."""
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forgets all tensors, before the next forward pass."""
        self.sources = WeakTensorKeyDictionary()
        self.image_size: tuple[int, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs an op and marks its outputs."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if torch.is_inference_mode_enabled() and name not in WINDOW_OPS:
            with self:  # in inference mode composite ops arrive here undecomposed
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "convolution":
            self.enter(inputs[0])
        known = [tensor for tensor in inputs if tensor in self.sources]
        schema = func._schema.arguments
        given = {each.name: each.default_value for each in schema if each.has_default_value()}
        given |= dict(zip((each.name for each in schema), args, strict=False)) | kwargs
        for made in tree_leaves(out) if known else ():
            if isinstance(made, Tensor):
                self.mark(made, known, self._source(func, name, given, known, made))
                if func._schema.is_mutable and made._base is not None:  # written through a view
                    self.mark(made._base, [made], self._kept(name, [made], made._base))
        return out

    def enter(self, tensor: Tensor) -> None:
        """Marks the first feature map that the model or a convolution gets as the image."""
        if tensor not in self.sources and tensor.dim() == 4 and self.image_size is None:
            self.image_size = (tensor.shape[2], tensor.shape[3])
            self.sources[tensor] = Source(stride=(1, 1))

    def of(self, tensor: Tensor) -> Source:
        """Returns the source of a tensor."""
        return self.sources.get(tensor, Source())

    def mark(self, tensor: Tensor, inputs: Sequence[Tensor], source: Source) -> None:
        """Notes the stride of a tensor and that it depends on all layers that its inputs do."""
        layers = (self.of(each).layers for each in (tensor, *inputs))
        self.sources[tensor] = replace(source, layers=source.layers.union(*layers))

    def _source(
        self, func: Any, name: str, given: dict[str, Any], known: list[Tensor], made: Tensor
    ) -> Source:
        if name in WINDOW_OPS and made.dim() == 4 and not given.get("transposed"):
            source = self.of(given["input"] if "input" in given else given["self"])
            kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
            stride, padding = given["stride"] or kernel, given["padding"]
            return strided(source, kernel, stride, padding, given.get("dilation", 1))
        if name.endswith("::deform_conv2d"):  # offsets have the positions of the output
            return self._kept(name, [given["offset"]], made)
        pointwise = torch.Tag.pointwise in func.tags or "_norm" in name
        if pointwise or name.strip("_") in SAME_POSITIONS:
            return self._kept(name, known, made)
        return Source(unknown=f"is computed with {name}")

    def _kept(self, name: str, inputs: list[Tensor], made: Tensor) -> Source:
        """Returns the source that all inputs share which have the size of the output."""
        same = [self.of(x) for x in inputs if _size(x) == _size(made)]
        if len({source.stride for source in same}) == 1:
            return same[0]
        other = Source(unknown=f"is computed with {name} from maps of another size or stride")
        return next((source for source in same if source.stride is None), other)


def _size(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.dim(), *tensor.shape[:1], *tensor.shape[2:])  # all but channels
