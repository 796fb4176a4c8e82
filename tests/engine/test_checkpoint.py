# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Weights of Detectron2, torchvision and our classifier load into deformable backbones."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import Checkpointer, UserError
from dcn_plugin.modeling import AlignedInceptionResNet
from tests.modeling.backbones import build, offset_branches, shake, slim_config

ROOT = Path(__file__).resolve().parents[2]
DCONV3 = {"DEFORM_LAST": [0, 0, 0, 3], "OUT_FEATURES": ["res5"], "RES5_DILATION": 1}
WIDE = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 64}
IMAGE = (1, 3, 64, 96)


def detector(name: str, **resnets: object) -> nn.Module:
    """Returns a backbone within a module, so that its keys have the prefix `backbone.`."""
    return nn.ModuleDict({"backbone": build(name, slim_config(**resnets)).float()})


def load(
    model: nn.Module, path: Path | str, log: pytest.LogCaptureFixture, kind: type = Checkpointer
) -> str:
    """Loads a file as trainers do, and returns the warnings."""
    with log.at_level(logging.INFO):
        log.clear()
        kind(model).resume_or_load(str(path), resume=False)
    return "\n".join(r.getMessage() for r in log.records if r.levelno >= logging.WARNING)


def torchvision_features(network: nn.Module, image: Tensor) -> Tensor:
    """Runs torchvision's ResNet without its classifier."""
    return nn.Sequential(*list(network.children())[:-2])(image)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize(("depth", "res2"), [(18, 64), (50, 256)])
def test_torchvisions_resnets_load(norm, depth, res2, tmp_path, caplog) -> None:
    theirs = shake(getattr(torchvision.models, f"resnet{depth}")(num_classes=5))
    weights = theirs.state_dict()
    if norm == "BN":  # as training scripts save them
        weights = {f"module.{name}": value for name, value in weights.items()}
        weights = {"epoch": 3, "state_dict": weights}
    torch.save(weights, tmp_path / "resnet.pth")
    last = [0, 0, 0, 2]
    shape = {**WIDE, "RES2_OUT_CHANNELS": res2, "NORM": norm, "STRIDE_IN_1X1": False}
    model = detector(
        "build_deform_resnet_backbone", **{**DCONV3, **shape, "DEPTH": depth, "DEFORM_LAST": last}
    )
    warnings = load(model, tmp_path / "resnet.pth", caplog)
    assert "offset" not in warnings
    assert "not found in the checkpoint" not in warnings  # the report of what is missing
    image = torch.randn(IMAGE, dtype=torch.float64)
    torch.testing.assert_close(
        model.double()["backbone"](image)["res5"], torchvision_features(theirs.double(), image)
    )


def test_the_shipped_config_fits_torchvisions_weights() -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(
        str(ROOT / "configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3_torchvision.yaml")
    )
    name = cfg.MODEL.WEIGHTS.removeprefix("torchvision://")
    transforms = torchvision.models.get_weight(name).transforms()
    assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert [m / 255 for m in cfg.MODEL.PIXEL_MEAN] == pytest.approx(transforms.mean)
    assert [s / 255 for s in cfg.MODEL.PIXEL_STD] == pytest.approx(transforms.std)


def test_torchvision_addresses_are_resolved(tmp_path, caplog, monkeypatch) -> None:
    theirs = torchvision.models.resnet18(num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    requested = []

    def get_weight(name: str) -> SimpleNamespace:
        requested.append(name)
        return SimpleNamespace(url=str(tmp_path / "resnet.pth"))

    monkeypatch.setattr(torchvision.models, "get_weight", get_weight)
    model = detector(
        "build_deform_resnet_backbone",
        **{**WIDE, "DEPTH": 18, "RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1},
    )
    load(model, "torchvision://ResNet18_Weights.IMAGENET1K_V1", caplog)
    assert set(requested) == {"ResNet18_Weights.IMAGENET1K_V1"}
    assert torch.equal(model["backbone"].res5[1].conv2.weight, theirs.layer4[1].conv2.weight)


@pytest.mark.parametrize("name", ["ResNet50", "ResNet50_Weights.NONE", "NoNet_Weights.DEFAULT"])
def test_unknown_torchvision_weights_are_an_error(name: str) -> None:
    model = nn.ModuleDict({"backbone": nn.Conv2d(3, 3, 1)})
    with pytest.raises(FileNotFoundError, match=f"no weights named '{name}'"):
        Checkpointer(model).load(f"torchvision://{name}")


def caffe2_name(name: str) -> str:
    """Returns the key of Detectron2's ImageNet files for a key of its ResNet."""
    for ours, theirs in (
        (r"^stem\.conv1\.norm\.", "res.conv1.bn."),
        (r"^stem\.", ""),
        ("conv1.norm", "branch2a.bn"),
        ("conv2.norm", "branch2b.bn"),
        ("conv3.norm", "branch2c.bn"),
        ("shortcut.norm", "branch1.bn"),
        (r"(res\d\.\d+)\.conv1", r"\1.branch2a"),
        ("conv2", "branch2b"),
        ("conv3", "branch2c"),
        ("shortcut", "branch1"),
        (r"bn\.weight$", "bn.s"),
        (r"\.weight$", ".w"),
        (r"\.bias$", ".b"),
    ):
        name = re.sub(ours, theirs, name)
    return name.replace(".", "_")


def test_detectron2s_imagenet_files_load(tmp_path, caplog) -> None:
    shape = {"NORM": "FrozenBN", **DCONV3}
    plain = detector("build_resnet_backbone", **{**shape, "DEFORM_LAST": [0, 0, 0, 0]})
    weights = {}
    for name, value in plain["backbone"].state_dict().items():
        if "running" not in name:  # folded into weight and bias
            value.normal_(0, 0.1)
            weights[caffe2_name(name)] = value.numpy().copy()
    assert {"conv1_w", "res_conv1_bn_s", "res5_0_branch1_w", "res4_5_branch2b_bn_b"} <= set(weights)
    weights |= {"fc1000_w": weights["conv1_w"][:, 0, 0], "fc1000_b": weights["res_conv1_bn_b"]}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(weights))
    load(plain, tmp_path / "R-50.pkl", caplog, DetectionCheckpointer)
    model = detector("build_deform_resnet_backbone", **shape)
    warnings = load(model, tmp_path / "R-50.pkl", caplog)
    assert "offset" not in warnings and "not found in the checkpoint" not in warnings
    image = torch.randn(IMAGE, dtype=torch.float64)
    torch.testing.assert_close(
        model.double()["backbone"](image)["res5"], plain.double()["backbone"](image)["res5"]
    )
    assert not any(p.any() for n, p in model.named_parameters() if "offset" in n)


@pytest.mark.parametrize("kind", [Checkpointer, DetectionCheckpointer])
@pytest.mark.parametrize("modulated", [False, True])
def test_detectron2s_dconv_checkpoints_load(kind, modulated, tmp_path, caplog) -> None:
    keys = {
        "DEFORM_ON_PER_STAGE": [False, True, True, True],
        "DEFORM_MODULATED": modulated,
        "OUT_FEATURES": ["res5"],
    }
    theirs = detector("build_resnet_backbone", **keys)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    zoo = {"model": {k: v.numpy() for k, v in theirs.state_dict().items()}, "__author__": "Zoo"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(zoo))
    model = detector("build_deform_resnet_backbone", **keys)
    assert load(model, tmp_path / "model_final.pkl", caplog, kind) == ""
    for name, value in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_offset_branches_missing_in_a_plain_checkpoint_are_logged(tmp_path, caplog) -> None:
    plain = detector("build_deform_resnet_backbone", **{**DCONV3, "DEFORM_LAST": [0, 0, 0, 0]})
    weights = plain.state_dict()
    torch.save({"model": weights}, tmp_path / "plain.pth")
    model = detector("build_deform_resnet_backbone", **DCONV3)
    assert load(model, tmp_path / "plain.pth", caplog) == ""
    count = len(offset_branches((3, 4, 6, 3), DCONV3["DEFORM_LAST"]))
    assert f"{count} parameters of offset branches keep their initial weights" in caplog.text
    assert f"no key of the file matches them: {count} of backbone.res5" in caplog.text
    # Whatever else is missing is still reported.
    del weights["backbone.res5.0.conv2.weight"]
    torch.save({"model": weights}, tmp_path / "less.pth")
    warnings = load(model, tmp_path / "less.pth", caplog)
    assert warnings.endswith("missing: backbone.res5.0.conv2.weight")


def test_the_classifier_loads_into_the_backbone(tmp_path, caplog) -> None:
    classifier = shake(AlignedInceptionResNet(num_classes=5, stem_channels=8, res2_channels=16))
    saved = {"model": classifier.state_dict(), "matching_heuristics": True}
    torch.save(saved, tmp_path / "air.pth")
    model = detector("build_aligned_inception_resnet_backbone", **DCONV3)
    warnings = load(model, tmp_path / "air.pth", caplog)
    assert "not found in the checkpoint" not in warnings and "offset" not in warnings
    image = torch.randn(IMAGE, dtype=torch.float64)
    classifier.double()
    pooled = model.double()["backbone"](image)["res5"].mean(dim=(2, 3))
    torch.testing.assert_close(classifier.linear(pooled), classifier(image)["linear"])


def test_a_damaged_file_is_an_error(tmp_path) -> None:
    path = tmp_path / "half.pth"
    torch.save({"model": {}}, path)
    whole = path.read_bytes()
    for content, message in (
        (b"", "but it is empty or cut off"),
        (b"half of a file", "but it is damaged, or not one of torch.save or pickle"),
        (whole[: len(whole) // 2], "RuntimeError: "),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"half\.pth must be a checkpoint, {message}"):
            Checkpointer(torch.nn.Linear(1, 1)).load(str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"[11/30 02:00:00 detectron2]: Rank of current process: 0\n",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(100),
        pickle.dumps({"weight": 1}, 2),
        pickle.dumps({"weight": 1}, 4),
    ],
    ids=["PNG", "log", "text", "zeros", "pickle 2", "pickle 4"],
)
def test_a_file_of_another_kind_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    message = r"but it is damaged, or not one of torch\.save or pickle \(which must be named \.pkl"
    with pytest.raises(UserError, match=message):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "model.pth"))


@pytest.mark.filterwarnings("ignore")  # of torch.load, and of torch.jit
def test_torchscript_is_an_error(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"but it is TorchScript: save model\.state_dict\(\)$"):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "model.pth"))


def test_other_errors_in_loading_are_not_changed(tmp_path) -> None:
    with pytest.raises(IsADirectoryError):
        Checkpointer(torch.nn.Linear(1, 1))._load_file(str(tmp_path))


def test_weights_for_evaluation_are_of_the_whole_model(tmp_path, caplog) -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    weights = {name: value for name, value in model.state_dict().items() if "backbone" in name}
    torch.save({"model": weights}, tmp_path / "backbone.pth")
    assert "2 tensors of the model are missing" in load(model, tmp_path / "backbone.pth", caplog)
    with pytest.raises(UserError, match=r"backbone\.pth has no weight that fits head of the Modul"):
        Checkpointer(model, trained=True).load(str(tmp_path / "backbone.pth"))
    Checkpointer(model, trained=True, allow_unmatched=True).load(str(tmp_path / "backbone.pth"))
    torch.save({"model": model.state_dict()}, tmp_path / "whole.pth")
    Checkpointer(model, trained=True).load(str(tmp_path / "whole.pth"))
