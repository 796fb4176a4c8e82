# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The ops to time, their shapes, and the implementations to compare (rivals)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from dcn_plugin.ops import deform_conv2d, deform_ps_roi_pool, deform_roi_pool

from . import onnx_runtime
from .onnx_runtime import OnnxRuntimeCall

# tf32 is float32 with GEMMs that a GPU may round.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DIRECTIONS = ("forward", "forward+backward")

OURS, TORCHVISION, MMCV, PLAIN = "dcn_plugin", "torchvision", "mmcv", "plain conv"
DEFORMOPS, ONNX_RUNTIME = "deformops", "ONNX Runtime"
NO_OFFSETS = f"{OURS}, no offsets"


@dataclass(frozen=True)
class Setting:
    """Device, dtype, threads and batch size of a measurement."""

    device: str
    dtype: str
    threads: int
    batch: int = 1

    def apply(self) -> None:
        """Sets the number of threads, and whether PyTorch may use tf32."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = self.dtype == "tf32"
        torch.backends.cudnn.allow_tf32 = self.dtype == "tf32"

    def randn(self, *size: int, layout: str = "nchw") -> Tensor:
        """Returns a random tensor of the dtype and the layout."""
        drawn = torch.randn(size, dtype=DTYPES[self.dtype], device=self.device)
        return drawn.contiguous(memory_format=LAYOUTS[layout])


@dataclass(frozen=True)
class Rival:
    """One implementation of a case."""

    name: str
    layout: str = "nchw"


@dataclass(frozen=True)
class Call:
    """A function with its arguments, and the gradient of its output."""

    function: Callable[..., Tensor]
    args: tuple
    grad_output: Tensor
    directions = DIRECTIONS

    def run(self, direction: str) -> tuple[Tensor, ...]:
        """Runs once; returns the output, and the gradients of the tensors that require them."""
        if direction == "forward":
            with torch.no_grad():
                return (self.function(*self.args),)
        output = self.function(*self.args)
        leaves = [a for a in self.args if isinstance(a, Tensor) and a.requires_grad]
        return (output, *torch.autograd.grad(output, leaves, self.grad_output))

    def timed(self, direction: str) -> Callable[[], object]:
        """Returns the function to time."""
        return functools.partial(self.run, direction)


@dataclass(frozen=True)
class ConvCase:
    """A convolution with stride 1 that preserves the size of the map."""

    layer: str
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: int = 3
    dilation: int = 1
    offset_groups: int = 1
    mask: bool = False
    batch: int = 1
    kind = "conv"

    @property
    def name(self) -> str:
        """Returns the layer and its shape."""
        size = f"{self.in_channels} x {self.height} x {self.width} -> {self.out_channels}"
        parts = [f"{self.layer}: {size}", f"{self.kernel} x {self.kernel}"]
        parts += [f"dilation {self.dilation}"] if self.dilation > 1 else []
        parts += [f"{self.offset_groups} offset groups"] if self.offset_groups > 1 else []
        return ", ".join([*parts, *(["mask"] if self.mask else [])])

    def small(self) -> ConvCase:
        """Returns a small case that runs the same code, for warm-up."""
        return replace(self, height=8, width=8)

    def flop(self, batch: int, direction: str) -> int:
        """Counts multiplications and additions; backward has two GEMMs of the forward's size."""
        k = self.in_channels * self.kernel**2
        forward = 2 * batch * self.height * self.width * self.out_channels * k
        return forward if direction == "forward" else 3 * forward

    def rivals(self, setting: Setting) -> dict[Rival, Call | OnnxRuntimeCall]:
        """Returns the calls, with random tensors and offsets of about a pixel."""
        calls: dict[Rival, Call | OnnxRuntimeCall] = {}
        size = (self.height, self.width)
        taps = self.offset_groups * self.kernel**2
        padding = self.dilation * (self.kernel // 2)
        geometry = (1, padding, self.dilation)  # with the stride
        for layout in LAYOUTS:
            randn = functools.partial(setting.randn, layout=layout)
            input = randn(setting.batch, self.in_channels, *size).requires_grad_()
            offset = randn(setting.batch, 2 * taps, *size).requires_grad_()
            weight = randn(self.out_channels, self.in_channels, self.kernel, self.kernel)
            weight.requires_grad_()
            mask = None
            if self.mask:
                mask = randn(setting.batch, taps, *size).sigmoid().requires_grad_()
            grad_output = randn(setting.batch, self.out_channels, *size)
            deformable = (input, offset, weight, None, *geometry, mask)
            calls[Rival(OURS, layout)] = Call(deform_conv2d, deformable, grad_output)
            functions = {}
            if layout == "nchw":  # the only one that they support
                # It leaves the caches cold and PyTorch's threads asleep, which matters the least to
                # the slowest: torchvision is next.
                if onnx_runtime.runs(setting.device, setting.dtype):
                    calls[Rival(ONNX_RUNTIME)] = OnnxRuntimeCall(deformable, setting.threads)
                functions[TORCHVISION] = (torchvision.ops.deform_conv2d, deformable)
                if mmcv_deform_conv2d() is not None:
                    functions[MMCV] = (mmcv_deform_conv2d(), deformable)
            # On the CPU it is eager PyTorch, which is no rival.
            if setting.device == "cuda" and deformops_conv2d(layout) is not None:
                functions[DEFORMOPS] = (deformops_conv2d(layout), deformable)
            functions[PLAIN] = (F.conv2d, (input, weight, None, *geometry))
            for name, (function, args) in functions.items():
                calls[Rival(name, layout)] = Call(function, args, grad_output)
        return calls


def offset_groups(offset: Tensor, weight: Tensor) -> int:
    """Returns the number of offset groups of a convolution."""
    return offset.shape[1] // (2 * weight.shape[2] * weight.shape[3])


@functools.cache
def mmcv_deform_conv2d() -> Callable[..., Tensor] | None:
    """Returns mmcv's functions with torchvision's arguments if its compiled ops are installed."""
    try:
        from mmcv.ops import deform_conv2d, modulated_deform_conv2d
    except ImportError:
        return None

    def function(
        input: Tensor, offset: Tensor, weight: Tensor, bias: None, *more: int | Tensor | None
    ) -> Tensor:
        *geometry, mask = more
        groups = (1, offset_groups(offset, weight))
        if mask is None:
            return deform_conv2d(input, offset, weight, *geometry, *groups)
        return modulated_deform_conv2d(input, offset, mask, weight, bias, *geometry, *groups)

    return function


@functools.cache
def deformops_conv2d(layout: str) -> Callable[..., Tensor] | None:
    """Returns deformops' function for a layout if it is installed: a fused Triton kernel."""
    try:
        from deformops.integrations.torchvision import deform_conv2d as nchw
        from deformops.registry import conv
    except ImportError:
        return None

    def nhwc(
        input: Tensor, offset: Tensor, weight: Tensor, bias: None, *more: int | Tensor | None
    ) -> Tensor:
        """Calls the op in its own layout; the permutations are views."""
        *geometry, mask = more
        groups = offset_groups(offset, weight)
        # (N, 2*G*K, H', W') -> (N, H', W', G, K, 2)
        offset = offset.permute(0, 2, 3, 1).unflatten(3, (groups, -1, 2))
        if mask is not None:  # (N, G*K, H', W') -> (N, H', W', G, K)
            mask = mask.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        input = input.permute(0, 2, 3, 1)
        output = conv(input, offset, weight, bias, mask, *geometry, offset_groups=groups)
        return output.permute(0, 3, 1, 2)

    return nchw if layout == "nchw" else nhwc


@dataclass(frozen=True)
class RoiCase:
    """RoI pooling with boxes like a detector's and torchvision's sampling."""

    name: str
    channels: int  # of the output
    position_sensitive: bool
    sampling_ratio: int  # 0: about one sample per pixel
    rois: int = 300
    height: int = 38
    width: int = 63
    bins: int = 7
    batch = 1
    kind = "roi"

    def small(self) -> RoiCase:
        """Returns a small case that runs the same code, for warm-up."""
        return replace(self, rois=2)

    def flop(self, batch: int, direction: str) -> None:
        """Returns None: there is no GEMM to compare with."""

    def boxes(self, dtype: torch.dtype) -> Tensor:
        """Returns random boxes of 32 to 400 pixels within the image, Tensor[rois, 5]."""
        image = torch.tensor([self.width * 16.0, self.height * 16.0])
        size = torch.minimum(32 + 368 * torch.rand(self.rois, 2), image)
        corner = torch.rand(self.rois, 2) * (image - size)
        return torch.cat([torch.zeros(self.rois, 1), corner, corner + size], dim=1).to(dtype)

    def rivals(self, setting: Setting) -> dict[Rival, Call]:
        """Returns the calls; torchvision has no offsets, so ours runs without them too."""
        ours, theirs = deform_roi_pool, functools.partial(torchvision.ops.roi_align, aligned=True)
        maps, offsets = self.channels, {"": 1}
        if self.position_sensitive:
            ours, theirs = deform_ps_roi_pool, torchvision.ops.ps_roi_align
            maps *= self.bins**2
            # In R-FCN the scores have offsets per class, the box deltas share them.
            offsets = {"": self.channels, ", shared offsets": 1}
        boxes = self.boxes(DTYPES[setting.dtype]).to(setting.device)
        all_offsets = {
            remark: setting.randn(self.rois, 2 * classes, self.bins, self.bins).requires_grad_()
            for remark, classes in offsets.items()
        }
        calls: dict[Rival, Call] = {}
        for layout in LAYOUTS:
            input = setting.randn(1, maps, self.height, self.width, layout=layout).requires_grad_()
            size = (self.rois, self.channels, self.bins, self.bins)
            grad_output = setting.randn(*size, layout=layout)
            options = (self.bins, 1 / 16, self.sampling_ratio)
            functions = {
                OURS + remark: (ours, (input, boxes, offset, *options))
                for remark, offset in {**all_offsets, ", no offsets": None}.items()
            }
            if layout == "nchw":
                functions[TORCHVISION] = (theirs, (input, boxes, *options))
            for name, (function, args) in functions.items():
                calls[Rival(name, layout)] = Call(function, args, grad_output)
        return calls


# Detectors on images of 600 x 1000 and 800 x 1344 pixels, segmentation, video restoration.
CONV_CASES = (
    ConvCase("res5", 512, 38, 63, 512, dilation=2),
    ConvCase("res4", 256, 50, 84, 256, mask=True),
    ConvCase("res3", 128, 100, 168, 128, mask=True),
    ConvCase("BiRefNet", 64, 64, 64, 256, kernel=7, mask=True),
    ConvCase("BiRefNet", 64, 128, 128, 256, mask=True),
    ConvCase("BiRefNet", 64, 128, 128, 256, kernel=1, mask=True),
    ConvCase("EDVR", 64, 180, 320, 64, offset_groups=8, mask=True),
    ConvCase("BasicVSR++", 64, 64, 64, 64, offset_groups=16, mask=True),
    ConvCase("small", 16, 56, 56, 16, batch=4),
)
ROI_CASES = (
    RoiCase("deformable RoI pooling: 300 RoIs, 256 channels, 2x2 samples", 256, False, 2),
    RoiCase("deformable RoI pooling: 300 RoIs, 256 channels, a sample per pixel", 256, False, 0),
    RoiCase("deformable PS RoI pooling: 300 RoIs, 21 classes, 2x2 samples", 21, True, 2),
    RoiCase("deformable PS RoI pooling: 300 RoIs, 21 classes, a sample per pixel", 21, True, 0),
)
QUICK_CONV_CASES = (
    ConvCase("quick", 16, 12, 14, 24, dilation=2, offset_groups=2, mask=True, batch=2),
)
QUICK_ROI_CASES = (
    RoiCase("small RoI pooling", 8, False, 2, rois=6, bins=3),
    RoiCase("small PS RoI pooling", 3, True, 0, rois=6, bins=3),
)
