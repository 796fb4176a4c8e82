# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Pictures and pages of all architectures and kinds of input, and errors."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path

import cv2
import matplotlib.image
import numpy as np
import pytest
import torch
import visualize
from viewer.inputs import read_inputs

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from dcn_plugin.engine import read_config

pytestmark = pytest.mark.usefixtures("shapes_root")

CONFIGS = Path(__file__).resolve().parent.parent / "configs/Shapes"
FEW = ("TEST.DETECTIONS_PER_IMAGE", "4")
CONFIG_NAMES = {
    "ca_rpn_slim_dconv3": 2,  # rows of the picture
    "deeplab_slim_dconv3": 2,
    "faster_rcnn_slim_dconv3_droi": 2,
    "rfcn_slim_dconv3_droi": 2,
    "rfcn_slim_droi": 2,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of untrained models with random offsets."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for name in CONFIG_NAMES:
        torch.manual_seed(1)
        model = build_model(read_config(Namespace(config_file=config(name), opts=[])))
        for key, parameter in model.named_parameters():
            if "offset" in key:
                torch.nn.init.normal_(parameter, std=0.05)
        paths[name] = str(folder / f"{name}.pth")
        torch.save({"model": model.state_dict()}, paths[name])
    return paths


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image file, wider than high."""
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8))
    return path


def config(name: str) -> str:
    return str(CONFIGS / f"{name}.yaml")


def run(name: str, weights: str, *words: object) -> None:
    command = ["--config-file", config(name), "--weights", weights, *words]
    visualize.main([str(word) for word in command])


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_all_architectures_are_visualized(name: str, weights, image: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    few = [] if "deeplab" in name else ["--score", "0.0", *FEW]
    run(name, weights[name], "--input", image, "--output", output, *few, "INPUT.MIN_SIZE_TEST", 48)
    picture = matplotlib.image.imread(output / "picture.png")
    assert picture.std() > 0.1
    page = (output / "picture.html").read_text()
    assert ('"bins": [[' in page) == ("droi" in name)
    assert ('"levels": []' in page) == ("dconv3" not in name)


OTHERS = {
    "FPN": {
        "MODEL.BACKBONE.NAME": "build_deform_resnet_fpn_backbone",
        "MODEL.RESNETS.RES5_DILATION": 1,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.DEFORM_LAST": [0, 1, 1, 3],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.CONV_DIMS": [-1],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.DEFORM": True,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [96]],
    },
    "Aligned-Inception-ResNet": {
        "MODEL.BACKBONE.NAME": "build_aligned_inception_resnet_backbone",
        "MODEL.RESNETS.DEFORM_LAST": [0, 0, 0, 3],
    },
    "Detectron2's DeformBottleneckBlock": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, True, True],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_backbones_are_visualized(kind: str, image: Path, tmp_path: Path) -> None:
    words = [str(word) for pair in OTHERS[kind].items() for word in pair]
    path = config("faster_rcnn_slim_plain")
    torch.manual_seed(1)
    model = build_model(read_config(Namespace(config_file=path, opts=words)))
    for key, parameter in model.named_parameters():
        if "offset" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    name, weights = "faster_rcnn_slim_plain", str(tmp_path / "model.pth")
    given = ["--input", image, "--output", tmp_path / "output", "--score", "0.0", *words, *FEW]
    run(name, weights, *given, "INPUT.MIN_SIZE_TEST", 75)  # maps with sizes rounded up
    assert (tmp_path / "output/picture.png").is_file()
    page = (tmp_path / "output/picture.html").read_text()
    levels = json.loads(re.search(r'"levels": (\[\[.*?\]\]), ', page)[1])
    assert [len(level) for level in levels] == [2 if "Inception" in kind else 1] * 3


def test_points_and_layers_can_be_chosen(weights, image: Path, tmp_path: Path, capsys) -> None:
    name = "ca_rpn_slim_dconv3"
    layers = "backbone.res5.1.conv2, backbone.res5.0.conv2"
    words = ["--points", "3,4", "120.5,80", "--layers", layers, "--format", "png"]
    run(name, weights[name], "--input", image, "--output", tmp_path / "output", *words)
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["picture.png"]
    assert "wrote the visualizations of 1 image to" in capsys.readouterr().out


def test_folders_videos_and_data_sets(weights, image: Path, tmp_path: Path) -> None:
    name = "ca_rpn_slim_dconv3"
    pixels = cv2.imread(str(image))
    (tmp_path / "folder").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / f"folder/{number}.jpg"), pixels)
    (tmp_path / "folder/notes.txt").write_text("not an image")
    video = cv2.VideoWriter(
        str(tmp_path / "video.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 96)
    )
    for _ in range(7):
        video.write(pixels)
    video.release()
    for source, names in (
        (tmp_path / "folder", ["0.html", "1.html"]),
        (tmp_path / "video.avi", ["video_000000.html", "video_000006.html"]),
        ("shapes_tiny_test", ["000000.html", "000001.html"]),
    ):
        output = tmp_path / f"output_{names[0]}"
        words = ["--limit", "2", "--format", "html"]
        run(name, weights[name], "--input", source, "--output", output, *words)
        assert sorted(path.name for path in output.iterdir()) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nowhere.jpg"], r"--input must be an image.*got 'nowhere.jpg'"),
        (["--input", "shapes_demo_tests"], r"--input must be.*nearest: shapes_demo_test"),
        (["--input", "{tmp}/broken.jpg"], r"--input: .*broken.jpg cannot be read as an image"),
        (["--input", "{tmp}/broken.mp4"], r"--input: .*broken.mp4 cannot be read as a video"),
        (["--input", "{tmp}/empty"], r"--input: there are no images in .*empty"),
        (
            ["--points", "160,3"],
            r"--points must be inside picture, x below 160 and y below 96, got 16",
        ),
        (
            ["--layers", "backbone.res4.1.conv2"],
            r"a layer must be one.*got 'backbone.res4.1.conv2'",
        ),
        (["--limit", "0"], r"--limit must be at least 1, got 0"),
        (["--score", "nan"], r"--score must be from 0 to 1, got nan"),
        (["--weights", "none.pth"], r"--weights must be a file or an address, got 'none.pth'"),
        (["--weights", "{tmp}/broken.jpg"], r"broken.jpg must be a checkpoint, but it is damaged"),
        (
            ["--config-file", config("ca_rpn_slim_plain")],
            r"has neither deformable convolutions nor",
        ),
        (["MODEL.DEVICE", "gpu"], r"MODEL.DEVICE must be cpu"),
        (["--weights", "{deeplab}"], r"has no weight that fits proposal_generator of the Category"),
        (["--weights", "{tmp}/nothing.pth"], r"nothing.pth has no weight that fits the backbone"),
        (["--config-file", "{tmp}/broken.jpg"], r"broken.jpg must have sections and keys in YAML"),
        (
            ["--config-file", "{image}"],
            r"picture.png must have sections and keys in YAML, .* UTF-8",
        ),
        (["--input", "{tmp}/broken.json"], r"broken.json cannot be read as an image"),
        (["MODEL.RESNETS.NORM", "Batch"], r"MODEL.RESNETS.NORM must be a name"),
        (["INPUT.MIN_SIZE_TEST", "-1"], r"INPUT.MIN_SIZE_TEST must be an integer"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, weights, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_text("not an image")
    (tmp_path / "broken.mp4").write_text("not a video")
    (tmp_path / "broken.json").write_text("{}")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    output = tmp_path / "output"
    name = "ca_rpn_slim_dconv3"
    places = {"tmp": tmp_path, "image": image, "deeplab": weights["deeplab_slim_dconv3"]}
    words = [word.format(**places) for word in words]
    given = ["--input", image, "--output", output]
    with pytest.raises(SystemExit, match=f"visualize: .*{message}"):
        run(name, weights[name], *given, *words)
    assert not output.exists()


def test_images_have_different_names(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a_2.jpg", "a_2.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 8, 3), np.uint8))
    names = [image.name for image in read_inputs(str(tmp_path), 9)]
    assert len(set(names)) == 4 and names[0] == "a"


def test_custom_data_have_class_names(weights, tmp_path: Path) -> None:
    DatasetCatalog.get("shapes_tiny_test")  # generates it
    metadata = MetadataCatalog.get("shapes_tiny_test")
    words = ["--test-data", metadata.json_file, metadata.image_root, "--input", "custom_test"]
    output = tmp_path / "output"
    name = "ca_rpn_slim_dconv3"
    given = ["--limit", "1", "--output", output, "--format", "html", "--score", "0.0"]
    run(name, weights[name], *words, *given, *FEW)
    (page,) = output.iterdir()
    labels = set(re.findall(r'"label": "(.*?) \d+ %"', page.read_text()))
    assert labels and labels <= set(metadata.thing_classes)


def test_points_are_two_numbers(image: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run("ca_rpn_slim_dconv3", "none", "--input", image, "--output", tmp_path, "--points", "3")
    assert "must be x,y, two numbers, got '3'" in capsys.readouterr().err


def test_the_output_must_be_a_folder(weights, image: Path, tmp_path: Path, capsys) -> None:
    name = "ca_rpn_slim_dconv3"
    for output in (image, image / "below"):
        with pytest.raises(SystemExit):
            run(name, weights[name], "--input", image, "--output", output)
        assert f"must be a folder that can be written to, got '{output}'" in capsys.readouterr().err
