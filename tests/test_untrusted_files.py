# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Every program that reads weights or proposals rejects files with code in one line."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import convert_weights
import dump_proposals
import effective_dilation
import numpy as np
import pytest
import torch
import train_classifier
import visualize
from PIL import Image

import train_net
from dcn_plugin.engine import check_config
from tests.engine.malicious_pickles import Command
from tests.test_train_net import arguments, run

ROOT = Path(__file__).resolve().parent.parent
SHAPES = str(ROOT / "configs/Shapes/rfcn_slim_dconv3_droi.yaml")
NOT_LOADED = r"^\w+: .*evil\.\w+ contains (posix\.)?mkdir, which is not loaded"


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The folder that the files make."""
    return tmp_path / "marker"


@pytest.fixture(params=["pkl", "pth", "pyth"])
def weights(request: pytest.FixtureRequest, marker: Path, monkeypatch) -> Path:
    """A file of weights that makes the marker with Detectron2's checkpointer."""
    path = marker.with_name(f"evil.{request.param}")
    content = {"model": {"a": torch.ones(1)}, "__author__": "me", "evil": Command(marker)}
    if request.param == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        torch.save({"model_state": {}, **content}, path)
    return path


def train(data: str, weights: Path, output: Path) -> None:
    run(data, output, **{"MODEL.WEIGHTS": weights})


def evaluate(data: str, weights: Path, output: Path) -> None:
    run(data, output, "--eval-only", **{"MODEL.WEIGHTS": weights})


def resume(data: str, weights: Path, output: Path, *flags: str) -> None:
    output.mkdir()
    weights.rename(output / weights.name)
    (output / "last_checkpoint").write_text(weights.name)
    run(data, output, "--resume", *flags)


def resume_evaluation(data: str, weights: Path, output: Path) -> None:
    resume(data, weights, output, "--eval-only")


def tool(main: Callable, *words: str) -> Callable[[str, Path, Path], None]:
    """Returns a function that runs a tool; {data}, {weights} and {output} are replaced."""

    def run_tool(data: str, weights: Path, output: Path) -> None:
        main([word.format(data=data, weights=weights, output=output) for word in words])

    return run_tool


def convert(data: str, weights: Path, output: Path) -> None:
    sys.argv[1:] = [str(weights), f"{output}.pth"]
    convert_weights.main()


def resume_classifier(data: str, weights: Path, output: Path) -> None:
    for part in ("train", "val"):
        for label in "ab":
            folder = output.with_name("images") / part / label
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(folder / "image.png")
    output.mkdir()
    weights.rename(output / weights.name)
    (output / "last_checkpoint").write_text(weights.name)
    small = "--blocks 1 1 1 1 --stem-channels 8 --res2-channels 16 --workers 0 --batch-size 1"
    files = f"--data {output.with_name('images')} --output {output} --resume --device cpu"
    train_classifier.main(f"{files} {small}".split())


PROGRAMS = {
    "train": train,
    "evaluate": evaluate,
    "resume": resume,
    "resume evaluation": resume_evaluation,
    "visualize": tool(
        visualize.main,
        *("--config-file", SHAPES, "--weights", "{weights}", "--input", "{data}"),
        *("--output", "{output}", "MODEL.DEVICE", "cpu"),
    ),
    "effective_dilation": tool(
        effective_dilation.main,
        *("--config-file", SHAPES, "--weights", "{weights}", "--dataset", "{data}"),
        *("MODEL.DEVICE", "cpu"),
    ),
    "dump_proposals": tool(
        dump_proposals.main,
        *("--config-file", SHAPES, "--dataset", "{data}", "--output", "{output}"),
        *("MODEL.WEIGHTS", "{weights}", "MODEL.DEVICE", "cpu"),
    ),
    "convert_weights": convert,
    "train_classifier": resume_classifier,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_with_code_are_rejected(
    program: str, weights: Path, marker: Path, tiny_coco: str, monkeypatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit, match=NOT_LOADED) as error:
        PROGRAMS[program](tiny_coco, weights, marker.with_name("output"))
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize("name", ["../evil.pkl", "{folder}/evil.pkl", "sub/evil.pkl"])
@pytest.mark.parametrize("flags", [(), ("--eval-only",)], ids=["train", "evaluate"])
def test_last_checkpoint_may_not_name_a_file_elsewhere(
    flags: tuple[str, ...], name: str, marker: Path, tiny_coco: str
) -> None:
    output = marker.with_name("output")
    output.mkdir()
    marker.with_name("evil.pkl").write_bytes(pickle.dumps(Command(marker)))
    (output / "last_checkpoint").write_text(name.format(folder=marker.parent))
    with pytest.raises(SystemExit, match="last_checkpoint must name a file of its folder"):
        run(tiny_coco, output, "--resume", *flags)
    assert not marker.exists()


def proposals(path: Path, content: object) -> dict[str, object]:
    """Writes a file of proposals for four images; returns the config that reads it."""
    path.write_bytes(pickle.dumps(content))
    return {
        "MODEL.LOAD_PROPOSALS": True,
        "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals",
        "DATASETS.PROPOSAL_FILES_TRAIN": f"('{path}',)",
        "DATASETS.PROPOSAL_FILES_TEST": f"('{path}',)",
    }


BOXES = [np.float32([[0, 0, 50, 50]])] * 4
GOOD = {"ids": [1, 2, 3, 4], "boxes": BOXES, "objectness_logits": [np.ones(1)] * 4}


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_proposals_with_code_are_rejected(
    part: str, marker: Path, tiny_coco: str, tmp_path: Path
) -> None:
    keys = proposals(tmp_path / "evil.pkl", {**GOOD, "evil": Command(marker)})
    args = arguments(tiny_coco, tmp_path / "output", **keys)
    with pytest.raises(ValueError, match=r"evil\.pkl contains posix\.mkdir, which is not loaded"):
        check_config(train_net.read_config(args), training=part == "TRAIN")
    # Without the check, as in the processes that `launch` starts, or of an address.
    flags = ["--eval-only"] if part == "TEST" else []
    with pytest.raises((SystemExit, ValueError), match=r"contains posix\.mkdir, which is not"):
        run(tiny_coco, tmp_path / "output", *flags, **keys)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must be a dict with ids or indexes"),
        ({**GOOD, "boxes": BOXES[:3]}, "must have .* the same number of images, got 4, 3, 4"),
        ({"ids": [1], "boxes": BOXES}, "must be a dict with objectness_logits or scores"),
    ],
)
def test_what_is_no_proposals_is_rejected(content, message, tiny_coco, tmp_path) -> None:
    args = arguments(tiny_coco, tmp_path, **proposals(tmp_path / "boxes.pkl", content))
    with pytest.raises(ValueError, match=rf"PROPOSAL_FILES_TEST: .*boxes\.pkl {message}"):
        check_config(train_net.read_config(args), training=False)
