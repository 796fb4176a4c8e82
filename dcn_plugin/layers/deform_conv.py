# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution as modules."""

from __future__ import annotations

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


# Of a module; whoever replaces it has to carry them over, or not replace it.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class DeformConv2d(nn.Conv2d):
    """A deformable convolution that is told where to sample.

    Has the contract of `torchvision.ops.DeformConv2d`, and the parameters of `nn.Conv2d`.
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
        """Takes the arguments of `nn.Conv2d`; padding is with zeros, in numbers of pixels."""
        if isinstance(padding, str):
            raise ValueError(f"padding must be one or two integers, got {padding!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves with displaced taps.

        Args:
            input: Tensor[N, C, H, W].
            offset: Tensor[N, 2*G*K, H', W'], (dy, dx) per tap.
            mask: Tensor[N, G*K, H', W'], a factor per tap.

        Returns:
            Tensor[N, C', H', W'].
        """
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
        )


class DeformConv2dPack(DeformConv2d):
    """A deformable convolution that learns where to sample, in the place of an `nn.Conv2d`.

    It owns the branch that predicts its offsets, `offset_conv`, which starts at zero: at first it
    is the plain convolution with the same weights (modulated: half of it, since the sigmoid of
    zero is 0.5).
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
        """Takes the arguments of `nn.Conv2d`, and two more.

        Args:
            in_channels: C.
            out_channels: C'.
            kernel_size: of the convolution and of its offset branch.
            stride: likewise.
            padding: likewise, with zeros, in numbers of pixels.
            dilation: likewise.
            groups: convolution groups.
            bias: whether the convolution has one; the offset branch always has.
            offset_groups: G, how many blocks of input channels have offsets of their own.
            modulated: whether taps are weighted by a learnt mask too (DCNv2).
        """
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self.offset_conv = OffsetConv2d(self, offset_groups, modulated)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, and sets the offset branch to zero."""
        super().reset_parameters()
        if "offset_conv" in self._modules:  # not yet, when `nn.Conv2d` is being made
            self.offset_conv.reset_parameters()

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, offset_groups: int = 1, modulated: bool = False
    ) -> DeformConv2dPack:
        """Makes the deformable convolution that takes a plain one's place.

        Args:
            conv: whose parameters it takes over: the same tensors, not copies.
            offset_groups: as above.
            modulated: as above.

        Raises:
            ValueError: if the convolution does more than `nn.Conv2d` with zeros around the image.
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
        """Convolves with taps displaced by what `offset_conv` predicts.

        Args:
            input: Tensor[N, C, H, W].

        Returns:
            Tensor[N, C', H', W'].
        """
        offset, mask = self.offset_conv(input)
        return super().forward(input, offset, mask)


def plain_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Returns the padding of a convolution in pixels, if it is nothing but an `nn.Conv2d`."""
    kind = type(conv)
    if isinstance(conv, LazyModuleMixin) and conv.has_uninitialized_params():
        raise ValueError("the convolution has no shape yet: run the network once first")
    if (
        parametrize.is_parametrized(conv)
        or kind.forward is not nn.Conv2d.forward
        or "forward" in vars(conv)
        or kind._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise ValueError(f"a {kind.__name__} does more than nn.Conv2d, which would be lost")
    if any(getattr(conv, hooks) for hooks in HOOKS):
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
