# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training of the classifier: on tiny images of three colours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="the classifier is Detectron2's ResNet")

import train_classifier
from classifier.images import MEAN, Share, validation_view
from PIL import Image

from dcn_plugin.engine import Checkpointer
from tests.modeling.backbones import build, slim_config

ROOT = Path(__file__).resolve().parent.parent

COLOURS = {"blue": (200, 60, 60), "green": (60, 200, 60), "red": (60, 60, 200)}  # OpenCV's order
SLIM = "--blocks 1 1 1 1 --stem-channels 8 --res2-channels 16 --workers 0 --device cpu"
SMALL = "--train-size 36 40 --test-size 36 --crop 32 --batch-size 6 --lr 0.05"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight noisy images of each colour to learn from, and three to validate on."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = np.array(colour) + rng.integers(-40, 40, (40, 48, 3))
                cv2.imwrite(str(folder / f"{number}.png"), image.clip(0, 255).astype(np.uint8))
    return root


def words(data: Path, output: Path, more: str = "") -> list[str]:
    return f"--data {data} --output {output} {SLIM} {SMALL} {more}".split()


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def test_learns_resumes_and_loads_into_the_backbone(data, tmp_path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_classifier.main(words(data, whole, "--epochs 6 --milestones 4"))
    found = metrics(whole)
    assert [m["lr"] for m in found] == pytest.approx([0.05] * 4 + [0.005] * 2)
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[-1]["top1"] == found[-1]["top5"] == 100 and found[-1]["images"] == 9

    train_classifier.main(words(data, parts, "--epochs 3 --milestones 4"))
    train_classifier.main(words(data, parts, "--epochs 6 --milestones 4 --resume"))
    assert [m["epoch"] for m in metrics(parts)] == [1, 2, 3, 4, 5, 6]
    resumed = weights(parts)
    for name, value in weights(whole).items():
        assert torch.equal(resumed[name], value), name

    capsys.readouterr()
    train_classifier.main(words(data, parts, "--eval-only"))
    assert json.loads(capsys.readouterr().out)["top1"] == 100


def test_deformable_layers_learn_too(data, tmp_path) -> None:
    train_classifier.main(words(data, tmp_path, "--epochs 1 --deform-last 0 0 0 1"))
    branches = {k: v for k, v in weights(tmp_path).items() if "offset" in k}
    assert len(branches) == 4 and all(v.abs().max() > 0 for v in branches.values())


def test_its_weights_are_a_backbones(data, tmp_path) -> None:
    # The backbone's config has no number of blocks: its full depth, at this width.
    train_classifier.main(words(data, tmp_path, "--epochs 1 --blocks 3 4 23 3"))
    cfg = slim_config(OUT_FEATURES=["res5"], RES5_DILATION=2)
    model = torch.nn.ModuleDict(
        {"backbone": build("build_aligned_inception_resnet_backbone", cfg).float()}
    )
    Checkpointer(model).load(str(tmp_path / "model_final.pth"))
    trained = weights(tmp_path)
    for name, value in model["backbone"].state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_images_are_as_detectron2_gives_them() -> None:
    pixel = np.array([[[10, 20, 30]]], dtype=np.uint8).repeat(40, 0).repeat(50, 1)  # RGB
    image = validation_view(36, 32)(Image.fromarray(pixel))
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([30.0, 20, 10]) - torch.tensor(MEAN))


def test_shares_cover_the_images() -> None:
    whole = [Share(11, rank, 3, None) for rank in range(3)]
    assert sorted(i for share in whole for i in share) == list(range(11))
    shuffled = [Share(11, rank, 3, seed=4) for rank in range(3)]
    first = [i for share in shuffled for i in share]
    assert len(first) == len(set(first)) == 9 and {len(s) for s in shuffled} == {3}
    for share in shuffled:
        share.epoch = 1
    assert [i for share in shuffled for i in share] != first


@pytest.mark.slow
def test_two_processes_learn_together(data, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "tools/train_classifier.py")]
    command += words(data, tmp_path, "--epochs 8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path)
    assert [m["images"] for m in found] == [9] * 8
    assert min(m["loss"] for m in found) < 0.8 * found[0]["loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--resume", "is not there: train first"),
        ("--batch-size 25", "at most the 24 images .*, got 25"),
        ("--deform-last 0 0 0 2", r"blocks of each stage, \[1, 1, 1, 1\], got \[0, 0, 0, 2\]"),
        ("--train-size 40 36", "the least and the most, got 40 36"),
        ("--data nowhere", "nowhere/train must have a folder of images for every class"),
    ],
)
def test_what_cannot_work_stops_with_a_line(data, tmp_path, more, message) -> None:
    with pytest.raises(SystemExit, match=f"train_classifier: .*{message}"):
        train_classifier.main([*words(data, tmp_path / "new"), *more.split()])
    assert not (tmp_path / "new").exists()


def test_only_a_checkpoint_of_the_same_network_is_resumed(data, tmp_path) -> None:
    train_classifier.main(words(data, tmp_path, "--epochs 1"))
    other = words(data, tmp_path, "--resume --deform-last 0 0 0 1")
    with pytest.raises(SystemExit, match=r"other deform-last: \[0, 0, 0, 0\], got \[0, 0, 0, 1\]"):
        train_classifier.main(other)
    path = tmp_path / "checkpoint.pth"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classes": ["cat", "dog", "eel"]}, path)
    with pytest.raises(SystemExit, match=r"other classes: \['cat', 'dog', 'eel'\], got"):
        train_classifier.main(words(data, tmp_path, "--resume"))


def test_a_damaged_checkpoint_is_named(data, tmp_path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"half of a file")
    with pytest.raises(SystemExit, match=r"train_classifier: .*checkpoint\.pth cannot be read"):
        train_classifier.main(words(data, tmp_path, "--resume"))


def test_a_checkpoint_is_not_overwritten(data, tmp_path) -> None:
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(SystemExit, match="add --resume, or name another --output"):
        train_classifier.main(words(data, tmp_path))


def test_classes_must_agree(data, tmp_path) -> None:
    (tmp_path / "train").symlink_to(data / "train")
    (tmp_path / "val/purple").mkdir(parents=True)
    (tmp_path / "val/purple/0.png").symlink_to(data / "val/red/0.png")
    with pytest.raises(SystemExit, match="same classes, only one has blue, green, purple, red"):
        train_classifier.main(words(tmp_path, tmp_path / "new"))
