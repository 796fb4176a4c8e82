# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ..ops import deform_conv2d
from .offset_branch import OffsetConv2d

"""
Shape shorthand in this module:

    N: images, C: input channels, C': output channels
    H, W: input size, H', W': output size
    K: taps, G: offset groups
"""


class DeformConv2d(nn.Conv2d):
    """Deformable convolution whose offsets are an input.

    Same interface as `torchvision.ops.DeformConv2d`; same parameters as `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        """Same arguments as `nn.Conv2d`; `padding` is zero padding and must be integers."""
        if isinstance(padding, str):
            raise ValueError(f"padding must be one or two integers, got {padding!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Applies the convolution with displaced taps.

        Args:
            input: Tensor[N, C, H, W].
            offset: Tensor[N, 2*G*K, H', W'], (dy, dx) per tap.
            mask: Tensor[N, G*K, H', W'], a factor for each tap.

        Returns:
            Tensor[N, C', H', W'].
        """
        weight, bias = self.weight, self.bias
        return deform_conv2d(
            input, offset, weight, bias, self.stride, self.padding, self.dilation, mask
        )


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution that predicts its own offsets; replaces an `nn.Conv2d`.

    Offsets (and masks) are predicted by the submodule `offset_conv`, which is initialized with
    zeros: initially the output is that of the plain convolution (half of it if modulated, since
    sigmoid(0) = 0.5).

    It loads the state dicts of mmcv's `DeformConv2dPack` and `ModulatedDeformConv2dPack` and of
    the DCNv2 module of CenterNet and YOLACT++, which name this submodule differently.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
    ) -> None:
        """Same arguments as `nn.Conv2d`, and two more.

        Args:
            in_channels: C.
            out_channels: C'.
            kernel_size: of the convolution and of its offset branch.
            stride: of the convolution and of its offset branch.
            padding: zero padding of both, in pixels.
            dilation: of the convolution and of its offset branch.
            groups: convolution groups.
            bias: whether the convolution has a bias; the offset branch always has one.
            offset_groups: G, number of blocks of input channels with separate offsets.
            modulated: whether to predict a mask too (DCNv2).
        """
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.offset_conv = OffsetConv2d(self, offset_groups, modulated)
        self.register_load_state_dict_pre_hook(_rename_offset_conv)

    def reset_parameters(self) -> None:
        """Reinitializes weight and bias, and sets the offset branch to zero."""
        super().reset_parameters()
        if "offset_conv" in self._modules:  # not yet in `nn.Conv2d.__init__`
            self.offset_conv.reset_parameters()

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, offset_groups: int = 1, modulated: bool = False
    ) -> DeformConv2dPack:
        """Creates the deformable convolution that replaces a plain one.

        Args:
            conv: the convolution; its parameters are shared, not copied.
            offset_groups: as in the constructor.
            modulated: as in the constructor.

        Raises:
            ValueError: if the convolution is not a plain `nn.Conv2d` with zero padding.
        """
        with conv.weight.device:
            pack = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                plain_padding(conv),
                conv.dilation,
                conv.groups,
                conv.bias is not None,
                offset_groups=offset_groups,
                modulated=modulated,
            )
        pack.to(conv.weight.dtype)
        pack.weight, pack.bias = conv.weight, conv.bias
        return pack.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Predicts the offsets and applies the convolution.

        Args:
            input: Tensor[N, C, H, W].

        Returns:
            Tensor[N, C', H', W'].
        """
        offset, mask = self.offset_conv(input)
        return super().forward(input, offset, mask)


def _rename_offset_conv(
    pack: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    """Renames the keys of other libraries' offset branches, whose layout is the same."""
    for theirs in ("conv_offset", "conv_offset_mask"):  # mmcv, DCNv2
        for parameter in ("weight", "bias"):
            old, new = f"{prefix}{theirs}.{parameter}", f"{prefix}offset_conv.{parameter}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)


def plain_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Returns the padding of a convolution in pixels; ValueError if it is not a plain one."""
    kind = type(conv)
    if isinstance(conv, LazyModuleMixin) and conv.has_uninitialized_params():
        raise ValueError("the convolution is not initialized yet: run the model once first")
    if (
        parametrize.is_parametrized(conv)
        or kind.forward is not nn.Conv2d.forward
        or "forward" in vars(conv)
        or kind._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise ValueError(f"a {kind.__name__} does more than nn.Conv2d, which would be lost")
    if any(value for name, value in vars(conv).items() if name.endswith("_hooks")):
        raise ValueError("the convolution has hooks, which would be lost: remove them first")
    if conv.padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros', got {conv.padding_mode!r}")
    if not isinstance(conv.padding, str):
        return conv.padding
    both = conv._reversed_padding_repeated_twice  # left, right, top, bottom
    if both[0] != both[1] or both[2] != both[3]:
        raise ValueError(
            f"padding {conv.padding!r} of an even kernel {conv.kernel_size} pads one side more "
            "than the other"
        )
    return both[2], both[0]
