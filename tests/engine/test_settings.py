# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A command line's config: what cannot be stops with one line."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="configs are Detectron2's")

from detectron2.data import MetadataCatalog

from dcn_plugin.engine import check_config, read_config
from tests.tiny_coco import write_tiny_coco

CONFIG = "configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml"


def arguments(*words: str, config: str = CONFIG, **more: object) -> Namespace:
    return Namespace(config_file=config, opts=list(words), **more)


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)


def test_words_at_the_end_win() -> None:
    cfg = read_config(arguments("SOLVER.BASE_LR", "0.5", "MODEL.RESNETS.DEFORM_LAST", "[0,0,1,3]"))
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.MODEL.RESNETS.DEFORM_LAST == [0, 0, 1, 3]
    assert cfg.MODEL.BACKBONE.NAME == "build_deform_resnet_backbone"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LR"], r"must come in pairs at the end, got SOLVER\.BASE_LR$"),
        (["SOLVER.BASELR", "1"], r"got 'SOLVER\.BASELR'; the nearest: SOLVER\.BASE_LR"),
        (["MODEL.RESNETS", "1"], r"a key of the config must come .* got 'MODEL\.RESNETS'"),
        (["SOLVER.MAX_ITER", "many"], r"SOLVER\.MAX_ITER must be a int, got 'many'"),
        (["DATASETS.TRAIN", "('a'"], r"DATASETS\.TRAIN must be a tuple, got"),
        (["MODEL.META_ARCHITECTURE", "RCFN"], r"ARCHITECTURE must be .*got 'RCFN'.*nearest: RFCN"),
        (["MODEL.ROI_HEADS.NAME", "DeformRoIHeads"], "nearest: DeformROIHeads"),
        (["MODEL.RPN.HEAD_NAME", "CategoryHead"], "RPN.HEAD_NAME .* nearest: CategoryRPNHead"),
        (["MODEL.ROI_BOX_HEAD.NAME", "FastRCNN"], r"ROI_BOX_HEAD\.NAME must be a name"),
        (["MODEL.BACKBONE.NAME", "nothing"], r"BACKBONE\.NAME must be a name that is registered"),
    ],
)
def test_words_that_cannot_be_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(arguments(*words))


def test_a_config_that_is_not_there_is_named() -> None:
    near = CONFIG.replace("dconv3", "dconv5")
    with pytest.raises(FileNotFoundError, match=rf"got '{near}'; the nearest: .*_dconv3\.yaml"):
        read_config(arguments(config=near))
    with pytest.raises(ValueError, match="--config-file must name a config"):
        read_config(arguments(config=""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {RESNET: {DEPTH: 50}}", r"got 'MODEL\.RESNET'"),
        ("MODEL: [", r"while parsing .*bad\.yaml"),
        ("MODEL:", r"bad\.yaml: "),
        ("MODEL: {RESNETS: {DEPTH: deep}}", r"bad\.yaml: Type mismatch"),
        ("_BASE_: nowhere.yaml", r"bad\.yaml: .*nowhere\.yaml"),
    ],
)
def test_a_config_that_cannot_be_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(f"VERSION: 2\n{text}\n")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_config(arguments(config=str(path)))
    assert "\n" not in str(caught.value)


def checked(*words: str, training: bool = True, **how: int) -> None:
    check_config(read_config(arguments("MODEL.WEIGHTS", "", *words)), training, **how)


def on(data: str, *words: str) -> list[str]:
    return ["DATASETS.TRAIN", f"('{data}',)", "DATASETS.TEST", f"('{data}',)", *words]


def test_what_fits_passes(tiny_coco) -> None:
    checked(*on(tiny_coco), processes=4)
    checked(*on(tiny_coco, "DATASETS.TRAIN", "('coco_2017_train',)"), training=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATASETS.TRAIN", "()"], r"DATASETS\.TRAIN must name a data set, got none"),
        (["DATASETS.TRAIN", "('coco_2017_tarin',)"], r"got 'coco_2017_tarin'; .*coco_2017_train"),
        (
            ["DATASETS.TRAIN", "('voc_2007_trainval',)"],
            r"voc_2007_trainval is not complete, there is no .*VOC2007/Annotations, no "
            r".*JPEGImages, no .*Main/trainval\.txt\. .*DETECTRON2_DATASETS.*get it from host",
        ),
        (["MODEL.WEIGHTS", "none.pth"], r"MODEL\.WEIGHTS must be a file.* got 'none\.pth'"),
        (["SOLVER.IMS_PER_BATCH", "6"], "multiple of the 4 processes, got 6"),
        (["SOLVER.IMS_PER_BATCH", "0"], "positive multiple of the 4 processes, got 0"),
        (["MODEL.DEVICE", "gpu"], r"MODEL\.DEVICE must be cpu, cuda or cuda:<n>, got 'gpu'"),
        (
            ["DATASETS.TEST", "('lvis_v1_val',)"],
            "lvis_v1_val is not complete",
        ),
        (["MODEL.LOAD_PROPOSALS", "True"], r"PROPOSAL_FILES_TRAIN must name a file for each"),
        (
            ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('p.pkl',)"],
            r"PROPOSAL_FILES_TRAIN: there is no p\.pkl; tools/dump_proposals\.py",
        ),
    ],
)
def test_what_does_not_fit_is_named(words: list[str], message: str, tiny_coco) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        checked(*on(tiny_coco, *words), processes=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to name")
def test_a_gpu_that_is_not_there_is_named(tiny_coco) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE must be cpu, since .* got 'cuda'"):
        checked(*on(tiny_coco, "MODEL.DEVICE", "cuda"))


def test_data_that_cannot_be_learnt_is_named(tiny_coco) -> None:
    metadata = MetadataCatalog.get(tiny_coco)
    metadata.thing_classes = ["disc", "square"]
    deeplab = ["MODEL.META_ARCHITECTURE", "DeepLab", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]
    with pytest.raises(ValueError, match="data sets with stuff_classes for DeepLab, got tiny_coco"):
        checked(*on(tiny_coco, *deeplab))


def test_weights_are_not_needed_where_a_checkpoint_is(tiny_coco, tmp_path: Path) -> None:
    words = on(tiny_coco, "MODEL.WEIGHTS", "gone.pth", "OUTPUT_DIR", str(tmp_path))
    for there in (False, True):
        if there:
            (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
            checked(*words, resume=True)
        with pytest.raises(FileNotFoundError, match=r"got 'gone\.pth'"):
            checked(*words, resume=not there)


def test_the_number_of_classes_must_be_that_of_the_data(tiny_coco) -> None:
    MetadataCatalog.get(tiny_coco).thing_classes = ["disc", "square"]
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES must be 2, .* got 80"):
        checked(*on(tiny_coco))
    checked(*on(tiny_coco, "MODEL.ROI_HEADS.NUM_CLASSES", "2"))


def test_custom_data_needs_two_paths_only(tmp_path: Path) -> None:
    paths = [write_tiny_coco(tmp_path / name, images=2) for name in ("a", "b")]
    train, test = ([str(path), str(path.parent)] for path in paths)
    cfg = read_config(arguments("MODEL.WEIGHTS", "", train_data=train, test_data=test))
    assert cfg.DATASETS.TRAIN == ("custom_train",) and cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    check_config(cfg, training=True)
