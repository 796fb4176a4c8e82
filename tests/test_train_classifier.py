# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training of the classifier on small images of three colours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import train_classifier
from PIL import Image

from detectron2.checkpoint import DetectionCheckpointer

from tests.modeling.backbones import build, slim_config

ROOT = Path(__file__).resolve().parent.parent

COLOURS = {"blue": (200, 60, 60), "green": (60, 200, 60), "red": (60, 60, 200)}  # OpenCV's order
SLIM = "--blocks 1 1 1 1 --stem-channels 8 --res2-channels 16 --workers 0 --device cpu"
SMALL = "--train-size 36 40 --test-size 36 --crop 32 --batch-size 6 --lr 0.02"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight noisy training images and three validation images of each colour."""
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


def metrics(output: Path, name: str) -> dict[int, float]:
    """Reads a metric by iteration."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row[name] for row in rows if name in row}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def test_trains_resumes_and_loads_into_the_backbone(data, tmp_path, capsys) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_classifier.main(words(data, whole, "--epochs 9 --milestones 6"))  # of 4 iterations
    rates = metrics(whole, "lr")
    assert (rates[23], rates[27]) == pytest.approx((0.02, 0.002))
    losses = metrics(whole, "total_loss")
    assert losses[35] < 0.9 * losses[3]  # medians
    accuracy = [metrics(whole, name)[36] for name in ("top1", "top5", "images")]
    assert accuracy == [100, 100, 9]

    train_classifier.main(words(data, parts, "--epochs 5 --milestones 6"))
    train_classifier.main(words(data, parts, "--epochs 9 --milestones 6 --resume"))
    assert list(metrics(parts, "top1")) == [3, 7, 11, 15, 20, 23, 27, 31, 36]
    resumed = weights(parts)
    for name, value in weights(whole).items():
        assert torch.equal(resumed[name], value), name

    capsys.readouterr()
    train_classifier.main(words(data, parts, "--eval-only"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 100


def test_deformable_layers_are_trained_too(data, tmp_path) -> None:
    train_classifier.main(words(data, tmp_path, "--epochs 1 --deform-last 0 0 0 1"))
    branches = {k: v for k, v in weights(tmp_path).items() if "offset" in k}
    assert len(branches) == 4 and all(v.abs().max() > 0 for v in branches.values())


def test_its_weights_load_into_the_backbone(data, tmp_path) -> None:
    # The backbone's config has no number of blocks: full depth at this width, not trained.
    args = train_classifier.parse_arguments(words(data, tmp_path, "--blocks 3 4 23 3 --seed 5"))
    train_classifier.ClassifierTrainer(args).checkpointer.save("model_final")
    cfg = slim_config(OUT_FEATURES=["res5"], RES5_DILATION=2)
    model = torch.nn.ModuleDict(
        {"backbone": build("build_aligned_inception_resnet_backbone", cfg).float()}
    )
    DetectionCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    trained = weights(tmp_path)
    for name, value in model["backbone"].state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_images_have_detectron2s_channel_order_and_mean() -> None:
    pixel = np.array([[[10, 20, 30]]], dtype=np.uint8).repeat(40, 0).repeat(50, 1)  # RGB
    image = train_classifier.validation_transform(36, 32)(Image.fromarray(pixel))
    assert image.shape == (3, 32, 32)
    mean = torch.tensor(train_classifier.PIXEL_MEAN)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([30.0, 20, 10]) - mean)


@pytest.mark.slow
def test_two_processes_train_together(data, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(ROOT / "tools/train_classifier.py")]
    command += words(data, tmp_path, "--epochs 8")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    images, losses = metrics(tmp_path, "images"), metrics(tmp_path, "total_loss")
    assert list(images.values()) == [9] * 8
    assert min(losses.values()) < 0.8 * losses[3]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--resume", "has no checkpoint: train first"),
        ("--batch-size 25", "at most the 24 images .*, got 25"),
        ("--deform-last 0 0 0 2", r"blocks of each stage, \[1, 1, 1, 1\], got \[0, 0, 0, 2\]"),
        ("--train-size 40 36", "must be minimum and maximum, got .40, 36"),
        ("--epochs 0", "--epochs must be above 0, got 0"),
        ("--workers -1", "--workers must be 0 or more, got -1"),
        ("--lr nan", "--lr must be a finite number, 0 or more, got nan"),
        ("--test-size 0", "--test-size must be above 0, got 0"),
        ("--milestones 5 3", r"--milestones must be ascending epochs above 0, got \[5, 3\]"),
        ("--device meta", "--device must be a device that PyTorch can use here"),
        ("--data nowhere", "nowhere/train"),
    ],
)
def test_wrong_arguments_are_one_line_errors(data, tmp_path, more, message) -> None:
    with pytest.raises(SystemExit, match=f"train_classifier: .*{message}"):
        train_classifier.main([*words(data, tmp_path / "new"), *more.split()])
    assert not (tmp_path / "new").exists()


def test_a_damaged_image_is_named(data, tmp_path) -> None:
    damaged = next((data / "train").rglob("*.png"))
    content = damaged.read_bytes()
    damaged.write_bytes(b"nothing")
    try:
        with pytest.raises(SystemExit, match=rf"{damaged.name} cannot be read as an image: cannot"):
            train_classifier.main(words(data, tmp_path / "new", "--epochs 1 --milestones 6"))
    finally:
        damaged.write_bytes(content)


def test_only_a_checkpoint_of_the_same_network_is_resumed(data, tmp_path) -> None:
    train_classifier.main(words(data, tmp_path, "--epochs 1"))
    other = words(data, tmp_path, "--resume --deform-last 0 0 0 1")
    with pytest.raises(SystemExit, match=r"with deform_last \[0, 0, 0, 0\], got \[0, 0, 0, 1\]"):
        train_classifier.main(other)
    path = tmp_path / "model_final.pth"
    state = torch.load(path, weights_only=True)
    state["network"]["classes"] = ["cat", "dog", "eel"]
    torch.save(state, path)
    with pytest.raises(SystemExit, match=r"with classes \['cat', 'dog', 'eel'\], got"):
        train_classifier.main(words(data, tmp_path, "--resume"))
    with pytest.raises(SystemExit, match="add --resume, or name another --output"):
        train_classifier.main(words(data, tmp_path))


def test_classes_must_agree(data, tmp_path) -> None:
    (tmp_path / "train").symlink_to(data / "train")
    (tmp_path / "val/purple").mkdir(parents=True)
    (tmp_path / "val/purple/0.png").symlink_to(data / "val/red/0.png")
    with pytest.raises(SystemExit, match="same classes, only one has blue, green, purple, red"):
        train_classifier.main(words(tmp_path, tmp_path / "new"))
