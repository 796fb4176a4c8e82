# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The table of parameters, FLOPs and run times."""

from __future__ import annotations

from pathlib import Path

import complexity
import pytest
import torch

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from dcn_plugin import add_dcn_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs/Shapes"


def command(*names: str, words: tuple[str, ...] = ()) -> list[str]:
    configs = [word for name in names for word in ("--config-file", str(CONFIGS / f"{name}.yaml"))]
    return [*configs, "--size", "64", "96", "--seconds", "0.1", *words]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ca_rpn", "faster_rcnn")]


@pytest.mark.parametrize("network", ["deeplab", "rfcn", *SLOW])
def test_a_deformable_model_costs_more_than_the_plain_one(network: str, capsys) -> None:
    last = f"{network}_slim_dconv3" + ("_droi" if "fcn" in network or "rcnn" in network else "")
    complexity.main(command(f"{network}_slim_plain", last))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == complexity.HEAD
    plain, deformable = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4])
    assert plain[0] == f"Shapes/{network}_slim_plain" and plain[-1] == "1.00"
    assert float(deformable[1]) > float(plain[1])
    assert float(deformable[2]) > float(plain[2])
    # CallFunction is a scripted function, whose operators fvcore does not see.
    counted = ("all operators counted", "FLOPs do not include prim::CallFunction")
    assert lines[-1].endswith(counted) and "64 x 96 pixels" in lines[-1]


def test_weights_are_loaded_for_each(tmp_path: Path, capsys) -> None:
    path, name = str(tmp_path / "model.pth"), "ca_rpn_slim_plain"
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    complexity.main(command(name, name, words=("--weights", path, "--weights", path)))
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split(" | ")[0] for row in rows] == [f"| Shapes/{name}", f"| Shapes/{name} (2)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "8", "64"), r"--size must be at least 32 32, got 8 64"),
        (("--seconds", "-1"), r"--seconds must be a finite number above 0, got -1"),
        (("--weights", "a", "--weights", "b"), r"--weights must be given for each of the 1 models"),
        (("--weights", "none.pth"), r"none.pth"),
        (("--config-file", "nothing.yaml"), r"nothing.yaml' does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=f"complexity: .*{message}"):
        complexity.main(command("ca_rpn_slim_plain", words=words))
