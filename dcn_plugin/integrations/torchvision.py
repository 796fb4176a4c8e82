# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Makes code that calls `torchvision.ops.deform_conv2d` run our kernels."""

from __future__ import annotations

import threading
import warnings
from typing import ClassVar

import torch
import torchvision
from torch import Tensor

from ..ops import deform_conv2d

# The arguments of torchvision::deform_conv2d; both numbers of groups follow from the shapes.
_ARGUMENTS = (
    *("input", "weight", "offset", "mask", "bias"),
    *("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
    *("groups", "offset_groups", "use_mask"),
)


class replace_deform_conv2d:
    """Replaces the kernels of torchvision's deformable convolution, until it is undone.

    The kernels are replaced in PyTorch's dispatcher, so this reaches every caller on CPU and CUDA:
    `torchvision.ops.deform_conv2d`, also where it was imported by name before, `DeformConv2d`,
    and models that are already compiled, exported or scripted. It holds for all threads of the
    process; do not switch while another thread runs the op. One object is for one block: entered
    twice, the first exit ends it. It is no decorator.

    Everything else stays torchvision's: argument checks of the Python function, autograd, which
    computes all gradients, autocast, and the memory format of results. A backward pass uses the
    kernels of the time it runs. Nested replacements end with the last one that is undone.

    Raises:
        RuntimeError: if torchvision has no such op, or one with other arguments.

    Example:
        >>> replacement = replace_deform_conv2d()  # from here on
        >>> replacement.undo()
        >>> with replace_deform_conv2d():  # or in a block
        ...     model(images)
    """

    _lock = threading.Lock()
    _active: ClassVar[set[replace_deform_conv2d]] = set()
    _library: ClassVar[torch.library.Library | None] = None

    def __init__(self) -> None:
        """Replaces the kernels now."""
        self.__enter__()

    def __enter__(self) -> replace_deform_conv2d:
        """Replaces the kernels; no effect while this object already does."""
        with self._lock:
            if not self._active:
                replace_deform_conv2d._library = _override()
            self._active.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Undoes the replacement."""
        self.undo()

    def undo(self) -> None:
        """Restores torchvision's kernels, unless another replacement is active."""
        with self._lock:
            self._active.discard(self)
            if not self._active and self._library is not None:
                self._library._destroy()
                replace_deform_conv2d._library = None


def _override() -> torch.library.Library:
    """Registers our kernels for torchvision's ops, until the library is destroyed."""
    _check_arguments("deform_conv2d", _ARGUMENTS)
    _check_arguments("_deform_conv2d_backward", ("grad", *_ARGUMENTS))
    library = torch.library.Library("torchvision", "IMPL")
    warn_always = torch.is_warn_always_enabled()
    with warnings.catch_warnings():
        # PyTorch warns of the first override of the process only: this one must not be it.
        torch.set_warn_always(True)
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        try:
            for device in ("CPU", "CUDA"):
                library.impl("deform_conv2d", _forward, device)
                library.impl("_deform_conv2d_backward", _backward, device)
        finally:
            torch.set_warn_always(warn_always)
    return library


def _check_arguments(name: str, expected: tuple[str, ...]) -> None:
    op = getattr(torch.ops.torchvision, name, None)
    found = None if op is None else tuple(a.name for a in op.default._schema.arguments)
    if found != expected:
        has = "no such op" if found is None else f"({', '.join(found)})"
        raise RuntimeError(
            f"torchvision::{name} must have the arguments ({', '.join(expected)}), but torchvision "
            f"{torchvision.__version__} has {has}; install the torchvision that matches PyTorch "
            f"{torch.__version__}, or call dcn_plugin.ops.deform_conv2d instead"
        )


def _forward(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *numbers: int
) -> Tensor:
    """Kernel of `torchvision::deform_conv2d`."""
    # Autocast has been applied, or torchvision has none on this device.
    with torch.autocast(input.device.type, enabled=False):
        output = deform_conv2d(
            input, offset, weight, bias, *_geometry(numbers), mask if numbers[-1] else None
        )
    return output.contiguous()  # as torchvision's fake kernel promises, as for all gradients


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    *numbers: int,
) -> tuple[Tensor, ...]:
    """Kernel of `torchvision::_deform_conv2d_backward`."""
    use_mask = bool(numbers[-1])
    computed = torch.ops.dcn_plugin._deform_conv2d_backward(
        grad,
        input,
        offset,
        weight,
        *_geometry(numbers),
        mask if use_mask else None,
        [True, True, True, True, use_mask],
    )
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = (g.contiguous() for g in computed)
    if not use_mask:
        grad_mask = torch.zeros_like(mask)
    return grad_input, grad_weight, grad_offset, grad_mask, grad_bias


def _geometry(numbers: tuple[int, ...]) -> list[list[int]]:
    """Returns stride, padding and dilation as (height, width)."""
    return [list(numbers[i : i + 2]) for i in (0, 2, 4)]
