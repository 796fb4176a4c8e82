# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""make_deformable."""

from __future__ import annotations

import copy
import importlib
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dcn_plugin.layers import DeformConv2dPack, make_deformable

on_every_device = pytest.mark.usefixtures("default_device")
LAST_THREE = ["layer4.0.conv2", "layer4.1.conv2", "layer4.2.conv2"]


def small() -> nn.Sequential:
    """Returns a model with three convolutions, one of them 1x1."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, (3, 1))
    )


@on_every_device
def test_torchvision_resnet_is_unchanged_trains_and_loads_its_checkpoint(
    torchvision: ModuleType,
) -> None:
    model = torchvision.models.resnet50(num_classes=7).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    checkpoint = {name: value.clone() for name, value in model.state_dict().items()}
    assert make_deformable(model, last=3) == LAST_THREE
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)

    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    nn.functional.cross_entropy(model(image), torch.tensor([1, 4])).backward()
    optimizer.step()
    for name in LAST_THREE:
        branch = model.get_submodule(name).offset_conv
        assert branch.weight.abs().max() > 0 and branch.bias.abs().max() > 0, name

    missing, unexpected = model.load_state_dict(checkpoint, strict=False)
    assert not unexpected
    assert set(missing) == {
        f"{name}.offset_conv.{kind}" for name in LAST_THREE for kind in ("weight", "bias")
    }
    for name in LAST_THREE:  # the checkpoint has no offset branches
        model.get_submodule(name).offset_conv.reset_parameters()
    torch.testing.assert_close(model.eval()(image), expected, rtol=1e-4, atol=1e-4)


@on_every_device
def test_a_converted_model_can_be_traced_and_exported(torchvision: ModuleType) -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    make_deformable(model, last=2, modulated=True)
    image = torch.randn(1, 3, 64, 64)
    expected = model(image)
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    parts = extraction.create_feature_extractor(model, ["layer4", "fc"])(image)
    torch.testing.assert_close(parts["fc"], expected)
    assert parts["layer4"].shape == (1, 512, 2, 2)
    torch.testing.assert_close(torch.jit.trace(model, image)(image), expected)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), expected)
    torch.testing.assert_close(copy.deepcopy(model)(image), expected)


@on_every_device
@pytest.mark.parametrize(
    ("how", "replaced"),
    [
        ({"last": 1}, ["3"]),
        ({"last": 2}, ["0", "3"]),
        ({"names": ["3", "2"]}, ["2", "3"]),
        ({"predicate": lambda name, conv: conv.in_channels == 8}, ["2", "3"]),
        ({"predicate": lambda name, conv: False}, []),
    ],
)
def test_the_selected_convolutions_are_replaced(how: dict, replaced: list[str]) -> None:
    model = small()
    plain = dict(model.named_modules())
    image = torch.randn(1, 3, 9, 8)
    expected = model(image)
    assert make_deformable(model, **how) == replaced
    for name, module in model.named_children():
        assert isinstance(module, DeformConv2dPack) == (name in replaced)
        if name in replaced:
            assert module.weight is plain[name].weight and module.bias is plain[name].bias
    torch.testing.assert_close(model(image), expected)


def test_a_shared_convolution_is_replaced_everywhere() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"first": shared, "again": nn.Sequential(shared)})
    assert make_deformable(model, last=1) == ["first"]
    assert isinstance(model["first"], DeformConv2dPack) and model["again"][0] is model["first"]


def test_offset_branches_are_not_replaced() -> None:
    model = small()
    make_deformable(model, last=1)
    assert make_deformable(model, last=1) == ["0"]
    assert type(model[3].offset_conv).__name__ == "OffsetConv2d"


def test_options_dtype_device_and_mode_are_preserved() -> None:
    model = small().double().eval()
    make_deformable(model, last=1, offset_groups=2, modulated=True)
    pack = model[3]
    assert pack.offset_conv.out_channels == 3 * 2 * 3 and not pack.training
    assert {p.dtype for p in pack.parameters()} == {torch.float64}


def test_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        model = small()
    make_deformable(model, last=2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.empty(2, 3, 9, 8, device="meta")).shape == (2, 4, 7, 8)


@on_every_device
def test_padding_same_is_supported() -> None:
    plain = nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(2, 1))
    image = torch.randn(1, 4, 9, 8)
    torch.testing.assert_close(DeformConv2dPack.from_conv(plain)(image), plain(image))


class Scaled(nn.Conv2d):
    """A convolution that does more than nn.Conv2d."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Doubles the result."""
        return 2 * super().forward(input)


def hooked(register: str) -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3)
    getattr(conv, register)(lambda *_: None)
    return conv


def patched() -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda input: -input
    return conv


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (Scaled(4, 4, 3), "a Scaled does more than nn.Conv2d"),
        (weight_norm(nn.Conv2d(4, 4, 3)), "a ParametrizedConv2d does more"),
        (patched(), "a Conv2d does more than nn.Conv2d"),
        (hooked("register_forward_hook"), "has hooks"),
        (hooked("register_full_backward_pre_hook"), "has hooks"),
        (hooked("register_load_state_dict_post_hook"), "has hooks"),
        (hooked("register_state_dict_pre_hook"), "has hooks"),
        (nn.LazyConv2d(4, 3), "is not initialized yet"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "'zeros', got 'reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "one side more"),
    ],
)
def test_convolutions_that_do_more_raise(conv: nn.Conv2d, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), conv)
    with pytest.raises(ValueError, match=f"make_deformable: 1: .*{message}"):
        make_deformable(model, last=2)
    assert type(model[0]) is nn.Conv2d  # not replaced


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "exactly one of last, names and predicate"),
        ({"last": 1, "names": ["0"]}, "exactly one of"),
        ({"last": 0}, "from 1 to 2, .* got 0"),
        ({"last": 3}, "from 1 to 2, .* got 3"),
        ({"names": "0"}, "list of names, got '0'"),
        ({"names": ["0", "8"]}, "no module named '8'"),
        ({"names": ["1"]}, "1 must be a plain nn.Conv2d, got a ReLU"),
        ({"last": 1, "offset_groups": 3}, "3: offset_groups must be a divisor of the 8"),
    ],
)
def test_invalid_arguments_raise(how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_deformable(small(), **how)


def test_a_bare_convolution_raises() -> None:
    with pytest.raises(ValueError, match="from_conv"):
        make_deformable(nn.Conv2d(3, 3, 3), last=1)
