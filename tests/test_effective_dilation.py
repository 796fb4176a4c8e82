# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Table 2 of a network whose answer is known."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="the networks are Detectron2's")

import effective_dilation

from detectron2.modeling import build_model

from dcn_plugin.engine import read_config

pytestmark = pytest.mark.usefixtures("shapes_root")

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/Shapes/ca_rpn_slim_dconv3_demo.yaml")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a network that has not learnt: its offsets are zero."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(read_config(Namespace(config_file=CONFIG, opts=[])))
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def command(weights: str, *words: str) -> list[str]:
    given = ["--config-file", CONFIG, "--weights", weights, "--dataset", "shapes_tiny_test"]
    return [*given, *words]


def test_before_training_it_is_the_dilation(weights: str, capsys) -> None:
    effective_dilation.main(command(weights, "--areas", "30", "45"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| backbone.res5")]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        f"backbone.res5.{block}.conv2" for block in range(3)
    ]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert len(cells) == 4 and set(cells) <= {"2.00 ± 0.00", "none"}
    counts = [int(cell) for cell in lines[-1].strip("|").split("|")[1:]]
    assert sum(counts) == 8 * 4 * 4 and counts[3] > 0  # eight images of 4 x 4 cells


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "shapes_tinny_test"], r"DATASETS.TEST must name.*nearest: shapes_tiny_test"),
        (["--dataset", "voc_2007_test"], r"voc_2007_test is not complete"),
        (["--areas", "45", "30"], r"areas must be two ascending numbers"),
        (["--limit", "-1"], r"--limit must be 0 or more, got -1"),
        (["--weights", "none.pth"], r"--weights must be a file"),
        (
            ["MODEL.RESNETS.DEFORM_LAST", "[0,0,0,0]"],
            r"without deformable convolutions has nothing",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str, weights: str) -> None:
    with pytest.raises(SystemExit, match=f"effective_dilation: .*{message}"):
        effective_dilation.main(command(weights, *words))
