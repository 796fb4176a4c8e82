# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""tools/convert_weights.py: files that Detectron2 loads, there and back, and its errors."""

from __future__ import annotations

import sys
from pathlib import Path

import convert_weights
import pytest
import torch
import torchvision

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from dcn_plugin.engine import Checkpointer
from tests.engine.mmdet_models import mmdet_model
from tests.engine.test_weight_conversion import CASCADE_STDS, config_text, detector_config


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, words)])
    convert_weights.main()


@pytest.mark.parametrize("checkpointer", [DetectionCheckpointer, Checkpointer])
def test_converted_detectors_load(checkpointer, tmp_path, monkeypatch, capsys) -> None:
    weights = mmdet_model(cascade=True).state_dict()
    file = {"state_dict": weights, "meta": {"config": config_text(CASCADE_STDS, "caffe")}}
    torch.save(file, tmp_path / "mmdet.pth")
    run(monkeypatch, tmp_path / "mmdet.pth", tmp_path / "d2.pth")
    printed = capsys.readouterr().out
    assert "Set MODEL.RESNETS.STRIDE_IN_1X1 True\n" in printed
    assert "INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [103.53" in printed
    # 1 / 0.033 and 1 / 0.067, not Detectron2's 30 and 15.
    assert "(20.0, 20.0, 10.0, 10.0), (30.303, 30.303, 14.9254, 14.9254))" in printed
    assert "24 keys were not converted (unknown modules): 24 of roi_head.mask_head" in printed
    model = build_model(detector_config(cascade=True))
    checkpointer(model).load(str(tmp_path / "d2.pth"))
    assert torch.equal(
        model.backbone.bottom_up.res3[0].conv2_offset.weight,
        weights["backbone.layer2.0.conv2.conv_offset.weight"],
    )
    # Detectron2's checkpointer does not know the normalization, for which the config is printed.
    factor = 0.033 * 30 if checkpointer is Checkpointer else 1.0
    torch.testing.assert_close(
        model.roi_heads.box_predictor[2].bbox_pred.bias[:2],
        weights["roi_head.bbox_head.2.fc_reg.bias"][:2] * factor,
    )


@pytest.mark.parametrize("to", ["mmdetection", "torchvision"])
def test_files_convert_there_and_back(to, tmp_path, monkeypatch) -> None:
    mmdet = to == "mmdetection"
    network = mmdet_model(modulated=True) if mmdet else torchvision.models.resnet18()
    weights = network.state_dict()
    torch.save({"state_dict": weights} if mmdet else weights, tmp_path / "theirs.pth")
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "ours.pth")
    run(monkeypatch, tmp_path / "ours.pth", tmp_path / "back.pth", "--to", to)
    back = torch.load(tmp_path / "back.pth")
    back = back["state_dict"] if mmdet else back
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_errors_are_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text.pth").write_text("text")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "unknown.pth")
    for name, message in (
        ("text.pth", "must be a checkpoint"),
        ("unknown.pth", "no key has a name that can be converted.*encoder.weight"),
        ("missing.pth", "No such file"),
    ):
        with pytest.raises(SystemExit, match=rf"^convert_weights: .*{name}.*{message}.*$"):
            run(monkeypatch, tmp_path / name, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
