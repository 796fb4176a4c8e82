# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Models with the keys, layout and formulas of MMDetection 2 and 3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import deform_conv2d


class MMDeformConv(nn.Module):
    """mmcv's DeformConv2dPack, or ModulatedDeformConv2dPack."""

    def __init__(self, conv: nn.Conv2d, modulated: bool) -> None:
        super().__init__()
        self.weight, self.padding, self.stride = conv.weight, conv.padding, conv.stride
        size = conv.kernel_size
        channels = (3 if modulated else 2) * size[0] * size[1]
        self.conv_offset = nn.Conv2d(conv.in_channels, channels, size, conv.stride, conv.padding)
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset(x), None
        if self.modulated:
            first, second, mask = torch.chunk(offset, 3, dim=1)
            offset, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        return deform_conv2d(x, offset, self.weight, None, self.stride, self.padding, mask=mask)


class MMResNet(ResNet):
    """A ResNet with a block in each stage, of style pytorch; deformable in the last three."""

    def __init__(self, modulated: bool, groups: int = 1) -> None:
        width = 64 if groups == 1 else 4
        super().__init__(Bottleneck, [1, 1, 1, 1], groups=groups, width_per_group=width)
        del self.fc, self.avgpool
        for stage in (self.layer2, self.layer3, self.layer4):
            stage[0].conv2 = MMDeformConv(stage[0].conv2, modulated)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outputs = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            outputs.append(x)
        return outputs


class ConvModule(nn.Module):
    """mmcv's convolution with a norm."""

    def __init__(self, channels: int, outputs: int, kernel: int, norm: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=not norm)
        self.norm_name = norm
        if norm == "bn":
            self.bn = nn.BatchNorm2d(outputs)
        elif norm == "gn":
            self.gn = nn.GroupNorm(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return getattr(self, self.norm_name)(x) if self.norm_name else x


class MMFPN(nn.Module):
    def __init__(self, channels: int, norm: str = "") -> None:
        super().__init__()
        inputs = (256, 512, 1024, 2048)
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1, norm) for n in inputs)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm) for _ in inputs)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.lateral_convs, features, strict=True)]
        for i in (3, 2, 1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], scale_factor=2, mode="nearest")
        maps = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        return [*maps, F.max_pool2d(maps[-1], 1, stride=2)]


class MMRPNHead(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, 3, 1)
        self.rpn_reg = nn.Conv2d(channels, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.rpn_conv(x).relu()
        return self.rpn_cls(x), self.rpn_reg(x)


class MMBBoxHead(nn.Module):
    """Shared2FCBBoxHead."""

    def __init__(self, channels: int, width: int, classes: int, agnostic: bool) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(width, classes + 1)
        self.fc_reg = nn.Linear(width, 4 if agnostic else 4 * classes)
        self.shared_fcs = nn.ModuleList([nn.Linear(channels * 49, width), nn.Linear(width, width)])

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = pooled.flatten(1)
        for fc in self.shared_fcs:
            x = fc(x).relu()
        return self.fc_cls(x), self.fc_reg(x)


class MMMaskHead(nn.Module):
    """FCNMaskHead."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(c, width, 3) for c in (channels, *[width] * 3))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.conv_logits = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.conv_logits(self.upsample(x).relu())


def mmdet_model(
    modulated: bool = False,
    *,
    cascade: bool = False,
    mask: bool = True,
    groups: int = 1,
    channels: int = 32,
    width: int = 24,
    classes: int = 5,
    norm: str = "",
) -> nn.Module:
    """Returns Faster, Mask or Cascade R-CNN of MMDetection with random weights and statistics."""
    model = nn.Module()
    model.backbone = MMResNet(modulated, groups)
    model.neck = MMFPN(channels, norm)
    model.rpn_head = MMRPNHead(channels)
    model.roi_head = nn.Module()
    boxes = [MMBBoxHead(channels, width, classes, cascade) for _ in range(3 if cascade else 1)]
    masks = [MMMaskHead(channels, width, classes) for _ in boxes]
    model.roi_head.bbox_head = nn.ModuleList(boxes) if cascade else boxes[0]
    if mask:
        model.roi_head.mask_head = nn.ModuleList(masks) if cascade else masks[0]
    for name, value in model.named_parameters():
        if value.dim() == 1 or "conv_offset" in name:
            nn.init.normal_(value, 1.0 if ".bn" in name and "weight" in name else 0.0, 0.05)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(value, 0, 0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(value, 0.7, 1.3)
    return model.eval()
