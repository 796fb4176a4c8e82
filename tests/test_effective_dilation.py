# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The tables of effective dilation and on-object shares."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import effective_dilation
import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from dcn_plugin.analysis.on_object_share import OFFSETS
from dcn_plugin.engine import read_config

pytestmark = pytest.mark.usefixtures("shapes_root")

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/Shapes/ca_rpn_slim_dconv3_demo.yaml")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of an untrained model, whose offsets are zero."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(read_config(Namespace(config_file=CONFIG, opts=[])))
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def command(weights: str, *words: str) -> list[str]:
    given = ["--config-file", CONFIG, "--weights", weights, "--dataset", "shapes_tiny_test"]
    return [*given, *words]


def test_before_training_the_effective_dilation_is_the_dilation(weights: str, capsys) -> None:
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
    assert sum(counts) == 8 * 4 * 4 and counts[3] > 0  # eight images of 4 x 4


def test_without_training_all_kinds_of_offsets_have_one_share(weights: str, capsys) -> None:
    effective_dilation.main(command(weights, "--areas", "30", "45", "--on-object"))
    rows = capsys.readouterr().out.splitlines()[-7:]
    cells = {row.split(" | ")[0].strip("| "): row.strip("|").split("|")[1:] for row in rows}
    assert [*cells] == ["offsets", "---", *OFFSETS, "random locations", "objects"]
    assert cells[OFFSETS[0]] == cells[OFFSETS[1]] == cells[OFFSETS[2]]
    assert sum(int(cell) for cell in cells["objects"]) > 8


def test_custom_data_are_measured_without_crowds(weights: str, tmp_path, capsys) -> None:
    DatasetCatalog.get("shapes_tiny_test")  # generates it
    metadata = MetadataCatalog.get("shapes_tiny_test")
    content = json.loads(Path(metadata.json_file).read_text())
    for item in content["annotations"]:
        item["iscrowd"] = 1
    whole = [0, 0, 64, 64]  # all of the first image is an object
    content["annotations"].append(
        {**content["annotations"][0], "id": 10**6, "bbox": whole, "iscrowd": 0}
    )
    (tmp_path / "own.json").write_text(json.dumps(content))
    words = ["--config-file", CONFIG, "--weights", weights, "--areas", "30", "45"]
    data = ["--test-data", str(tmp_path / "own.json"), metadata.image_root]
    effective_dilation.main([*words, *data])
    found = capsys.readouterr().out.splitlines()[-1].strip("|").split("|")[1:]
    counts = [int(cell) for cell in found]
    boxes = [item["bbox"] for item in content["annotations"][:-1] if item["image_id"] != 1]
    assert counts[:2] == [0, 0] and counts[2] == 16
    assert boxes and 0 < counts[3] < 7 * 16  # crowds are not background


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--dataset", "shapes_tinny_test"],
            r"must be registered.*nearest: shapes_tiny_test",
        ),
        (["--dataset", "voc_2007_test"], r"voc_2007_test is incomplete"),
        (["--areas", "45", "30"], r"areas must be two ascending numbers"),
        (["--limit", "-1"], r"--limit must be 0 or more, got -1"),
        (["--weights", "none.pth"], r"--weights must be a file"),
        (
            ["MODEL.RESNETS.DEFORM_LAST", "[0,0,0,0]"],
            r"has no deformable convolutions",
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str, weights: str) -> None:
    with pytest.raises(SystemExit, match=f"effective_dilation: .*{message}"):
        effective_dilation.main(command(weights, *words))
