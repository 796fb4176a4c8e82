# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Configs from command lines, and their checks before training."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import BoxMode

from dcn_plugin.engine import UserError, check_config, exit_on_error, read_config
from tests.datasets import tiny_panoptic, unregister
from tests.tiny_coco import write_json, write_tiny_coco

CONFIG = "configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml"


def arguments(*words: str, config: str = CONFIG, **more: object) -> Namespace:
    return Namespace(config_file=config, opts=list(words), **more)


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)


def test_keys_at_the_end_override_the_file() -> None:
    cfg = read_config(arguments("SOLVER.BASE_LR", "0.5", "MODEL.RESNETS.DEFORM_LAST", "[0,0,1,3]"))
    assert cfg.SOLVER.BASE_LR == 0.5 and cfg.MODEL.RESNETS.DEFORM_LAST == [0, 0, 1, 3]
    assert cfg.MODEL.BACKBONE.NAME == "build_deform_resnet_backbone"


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps", "xla"])
def test_only_cuda_in_the_file_is_replaced_without_a_gpu(device, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.yaml").write_text(f"VERSION: 2\nMODEL: {{DEVICE: '{device}'}}\n")
    cfg = read_config(arguments(config=str(tmp_path / "config.yaml")))
    assert device.replace("cuda:1", "cpu") == cfg.MODEL.DEVICE
    cfg = read_config(arguments("MODEL.DEVICE", "cuda", config=str(tmp_path / "config.yaml")))
    assert cfg.MODEL.DEVICE == "cuda"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LR"], r"must each have a value, got 1 words, the last one SOLVER\.BASE_LR$"),
        (["SOLVER.MAX_ITER=3"], r"write SOLVER\.MAX_ITER 3 instead of SOLVER\.MAX_ITER=3"),
        (["SOLVER", "3"], r"<class 'int'>\) for config key: SOLVER; it is a section, whose keys"),
        (["SOLVER.BASELR", "1"], r"key: SOLVER\.BASELR; the nearest: SOLVER\.BASE_LR"),
        (["SEED.X", "1"], r"^command line: Non-existent key: SEED\.X; the nearest: .*SEED"),
        (
            ["SEED", "1", "SOLVER.MAX_ITER.X", "1"],
            r"key: SOLVER\.MAX_ITER\.X; the nearest: SOLVER\.MAX_ITER",
        ),
        (["MODEL.DEVICE.c", "1"], r"key: MODEL\.DEVICE\.c; the nearest: MODEL\.DEVICE"),
        (["MODEL.RESNET.DEPTH", "1"], r"key: MODEL\.RESNET\.DEPTH; the nearest: .*RESNETS\.DEPTH"),
        (
            ["SOLVER.MAX_ITER", "many"],
            r"Type mismatch .* many\) for config key: SOLVER\.MAX_ITER; the",
        ),
        (["DATASETS.TRAIN", "('a'"], r"Type mismatch .* for config key: DATASETS\.TRAIN"),
        (["SOLVER.MAX_ITER", "2", "--resume"], "must stand before the config keys .*--resume"),
    ],
)
def test_wrong_keys_and_values_are_errors(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(arguments(*words))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {RESNET: {DEPTH: 50}}", r"key: MODEL\.RESNET; the nearest: MODEL\.RESNETS"),
        ("MODEL: [", r"while parsing .*bad\.yaml"),
        ("MODEL:", "config key: MODEL"),
        ("MODEL: {RESNETS: {DEPTH: deep}}", "Type mismatch .* key: MODEL.RESNETS.DEPTH"),
        ("_BASE_: nowhere.yaml", r"nowhere\.yaml"),
        ("_BASE_: bad.yaml", "a _BASE_ leads back to the file"),
        (None, r"Config file '.*bad\.yaml' does not exist"),
    ],
)
def test_a_bad_config_file_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(f"VERSION: 2\n{text}\n")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_config(arguments(config=str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "MODEL.META_ARCHITECTURE",
            "RCFN",
            "program: No object named 'RCFN' found in 'META_ARCH' registry",
        ),
        ("MODEL.BACKBONE.NAME", "nothing", "'nothing' found in 'BACKBONE' registry"),
        ("MODEL.ROI_HEADS.NAME", "DeformRoIHeads", "'DeformRoIHeads' found in 'ROI_HEADS'"),
    ],
)
def test_unregistered_names_end_the_program_with_one_line(
    key: str, name: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message), exit_on_error("program"):
        build_model(read_config(arguments(key, name, "MODEL.RPN.IN_FEATURES", "['res5']")))


def checked(*words: str, training: bool = True, stock_trainer: bool = True, **options: Any) -> None:
    weights = "" if training else "https://example.org/model.pth"
    given = ["MODEL.WEIGHTS", weights, *DEFAULTS, *words]
    cfg = read_config(arguments(*given))
    check_config(cfg, training, stock_trainer=stock_trainer, **options)


DEFAULTS = [
    *("MODEL.RETINANET.IN_FEATURES", "['res5']", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.RETINANET.NUM_CLASSES", "2"),
]


def on(data: str, *words: str) -> list[str]:
    return ["DATASETS.TRAIN", f"('{data}',)", "DATASETS.TEST", f"('{data}',)", *words]


def test_a_correct_config_passes(tiny_coco) -> None:
    cfg = get_cfg()  # without add_dcn_config
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = "cpu", (tiny_coco,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_config(cfg, training=True)
    checked(*on(tiny_coco))
    checked(*on(tiny_coco, "DATASETS.TRAIN", "('coco_2017_train',)"), training=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DATASETS.TRAIN", "()"], r"DATASETS\.TRAIN must name a data set"),
        (["DATASETS.TRAIN", "('coco_2017_tarin',)"], r"got 'coco_2017_tarin'; .*coco_2017_train"),
        (
            ["DATASETS.TEST", "('voc_2007_test',)"],
            r"DATASETS\.TEST: voc_2007_test is incomplete, missing .*VOC2007, "
            r".*Main/test\.txt\. .*DETECTRON2_DATASETS.*docs/data\.md",
        ),
        (["DATASETS.TEST", "('lvis_v1_val',)"], "lvis_v1_val is incomplete"),
        (["DATASETS.TEST", "('voc_2012_sem_seg_val',)"], "voc_2012_sem_seg_val is incomplete"),
        (["MODEL.WEIGHTS", "/"], r"MODEL\.WEIGHTS must be a file.* got '/'"),
        (["MODEL.WEIGHTS", "none.pth"], r"MODEL\.WEIGHTS must be a file.* got 'none\.pth'"),
        (["MODEL.DEVICE", "gpu"], r"MODEL\.DEVICE must be cpu, cuda or cuda:<n>, got 'gpu'"),
        (["MODEL.DEVICE", "None"], r"MODEL\.DEVICE must be cpu, cuda or cuda:<n>, got None"),
        (["MODEL.DEVICE", "meta"], r"must be a device that PyTorch can use here, .* got 'meta'"),
        (
            ["MODEL.DEVICE", "xpu:99"],
            r"must be a device that PyTorch can use here, .* got 'xpu:99'",
        ),
        (["SOLVER.MAX_ITER", "0"], r"SOLVER\.MAX_ITER must be a positive integer"),
        (["OUTPUT_DIR", "README.md"], r"OUTPUT_DIR must be a folder that .* got 'README\.md'"),
        (["OUTPUT_DIR", ""], r"OUTPUT_DIR must be a folder that .* got ''"),
        (["OUTPUT_DIR", "README.md/a"], r"OUTPUT_DIR must be a folder .* got 'README\.md/a'"),
        (["MODEL.LOAD_PROPOSALS", "True"], r"PROPOSAL_FILES_TRAIN must have a file for each"),
        (
            ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", "('p.pkl',)"],
            r"PROPOSAL_FILES_TRAIN must be a file or an address, got 'p\.pkl'",
        ),
    ],
)
def test_what_would_fail_later_is_an_error(words: list[str], message: str, tiny_coco) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        checked(*on(tiny_coco, *words))


def test_evaluation_needs_weights(tiny_coco, tmp_path: Path) -> None:
    words = on(tiny_coco, "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS must name the weights to evaluate, got n"):
        checked(*words, training=False, resume=True)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    checked(*words, training=False, resume=True)


def test_a_batch_is_divided_among_the_processes(tiny_coco) -> None:
    words = on(tiny_coco, "SOLVER.IMS_PER_BATCH", "6")
    checked(*words, processes=3)
    with pytest.raises(UserError, match=r"SOLVER\.IMS_PER_BATCH must be a multiple of the 4 proc"):
        checked(*words, processes=4)
    checked(*words, "SOLVER.REFERENCE_WORLD_SIZE", "2", processes=4)  # scales it


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to name")
def test_a_missing_gpu_is_an_error(tiny_coco) -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE must be cpu, since .* got 'cuda'"):
        checked(*on(tiny_coco, "MODEL.DEVICE", "cuda"))


def test_weights_are_not_needed_if_there_is_a_checkpoint(tiny_coco, tmp_path: Path) -> None:
    words = on(tiny_coco, "MODEL.WEIGHTS", "gone.pth", "OUTPUT_DIR", str(tmp_path))
    for exists in (False, True):
        if exists:
            (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
            checked(*words, resume=True)
        with pytest.raises(FileNotFoundError, match=r"got 'gone\.pth'"):
            checked(*words, resume=not exists)


def test_addresses_are_not_looked_up(tiny_coco) -> None:
    address = "https://example.org/instances.json"
    register_coco_instances("tiny_remote", {}, address, "https://example.org/images")
    try:
        checked(*on("tiny_remote"))
    finally:
        unregister("tiny_remote")


def test_panoptic_files_are_for_evaluation(tmp_path: Path) -> None:
    with tiny_panoptic(tmp_path) as name:
        (tmp_path / "panoptic.json").unlink()
        words = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]
        checked(*on(name, *words, "DATASETS.TEST", "()"))
        with pytest.raises(FileNotFoundError, match=r"DATASETS\.TEST: .*panoptic\.json"):
            checked(*on(name, *words))


def test_weights_may_have_a_query(tiny_coco, tmp_path: Path) -> None:
    (tmp_path / "R-50.pth").touch()
    checked(*on(tiny_coco, "MODEL.WEIGHTS", f"{tmp_path}/R-50.pth?matching_heuristics=True"))


ARCHITECTURES = {
    "GeneralizedRCNN": ("ROI_HEADS", "thing_classes"),
    "RFCN": ("ROI_HEADS", "thing_classes"),
    "RetinaNet": ("RETINANET", "thing_classes"),
    "PanopticFPN": ("SEM_SEG_HEAD", "stuff_classes"),
    "DeepLab": ("SEM_SEG_HEAD", "stuff_classes"),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_needs_all_classes_of_the_training_set(
    architecture: str, tiny_coco, caplog
) -> None:
    section, attribute = ARCHITECTURES[architecture]
    MetadataCatalog.get(tiny_coco).set(**{attribute: ["disc", "square"]})

    def check(classes: int, **how: bool) -> str:
        words = ["MODEL.META_ARCHITECTURE", architecture]
        caplog.clear()
        checked(*on(tiny_coco, *words, f"MODEL.{section}.NUM_CLASSES", str(classes)), **how)
        return caplog.text

    assert check(2) == ""
    with pytest.raises(ValueError, match=f"{section}.NUM_CLASSES is 1, tiny_coco in .* 2 classes"):
        check(1)
    assert "NUM_CLASSES is 1" in check(1, training=False)
    kinds = () if attribute == "thing_classes" else ("sem_seg", "cityscapes_sem_seg")
    for kind in ("coco", "pascal_voc", "own", *kinds):
        # What Detectron2 accepts passes with a warning.
        MetadataCatalog.get(tiny_coco).__dict__["evaluator_type"] = kind
        message = f"{section}.NUM_CLASSES is 80, tiny_coco in DATASETS.TEST has 2 classes"
        if kind in kinds:
            for training in (True, False):
                with pytest.raises(ValueError, match=f"{message}, and its evaluation fails"):
                    check(80, training=training)
            assert "in DATASETS.TRAIN has 2 classes" in caplog.text or not training
        else:
            assert message in check(80)


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_detectors_need_boxes(split: str, tiny_coco, tmp_path: Path) -> None:
    with tiny_panoptic(tmp_path) as name:
        words = [f"DATASETS.{split}", f"('{name.replace('_separated', '_stuffonly')}',)"]
        with pytest.raises(UserError, match=rf"DATASETS\.{split}: .* has labels of pixels, which"):
            checked(*on(tiny_coco, *words), training=split == "TRAIN")


def test_classes_are_those_in_the_json_file(tiny_coco) -> None:
    assert "thing_classes" not in MetadataCatalog.get(tiny_coco).as_dict()  # not loaded yet
    with pytest.raises(UserError, match=r"NUM_CLASSES is 1, tiny_coco in DATASETS\.TRAIN has 2"):
        checked(*on(tiny_coco, "MODEL.ROI_HEADS.NUM_CLASSES", "1"))
    DatasetCatalog.get(tiny_coco)  # an error if its classes were others
    assert MetadataCatalog.get(tiny_coco).thing_classes == ["disc", "square"]


def test_masks_and_keypoints_are_for_architectures_that_read_them(tiny_coco) -> None:
    path = Path(MetadataCatalog.get(tiny_coco).json_file)
    content = json.loads(path.read_text())
    for item in content["annotations"]:
        del item["segmentation"]
    write_json(path, content)
    words = on(tiny_coco, "MODEL.MASK_ON", "True")
    checked(*words, "MODEL.META_ARCHITECTURE", "RetinaNet")
    with pytest.raises(UserError, match="annotations have no segmentation"):
        checked(*words)


def test_values_of_keys_that_are_not_read_are_warnings(tiny_coco, caplog) -> None:
    path = Path(MetadataCatalog.get(tiny_coco).json_file)
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[1.0, float("nan"), 2, 2, 3, 3]]
    content["annotations"][1]["keypoints"] = [1, 2]
    write_json(path, content)
    checked(*on(tiny_coco))
    assert "polygon that is not finite" in caplog.text and "keypoints that are" in caplog.text
    for split in ("TRAIN", "TEST"):
        words = ["DATASETS.TRAIN", "('coco_2017_train',)"] * (split == "TEST")
        with pytest.raises(UserError, match=f"{split}: .*polygon that is not finite numbers"):
            checked(*on(tiny_coco, *words, "MODEL.MASK_ON", "True"), training=split == "TRAIN")


def test_one_training_set_may_have_no_objects(tiny_coco, tmp_path: Path, caplog) -> None:
    path = write_tiny_coco(tmp_path / "empty", images=2)
    content = json.loads(path.read_text())
    write_json(path, {**content, "annotations": []})
    register_coco_instances("negatives", {}, str(path), str(path.parent))
    try:
        checked(*on("negatives", "DATASETS.TRAIN", f"('{tiny_coco}', 'negatives')"))
        assert "negatives: " in caplog.text and "no image left" in caplog.text
        with pytest.raises(UserError, match="no image left"):
            checked(*on("negatives"))
    finally:
        unregister("negatives")


def test_paths_of_data_sets_may_be_path_objects(tmp_path: Path) -> None:
    path = write_tiny_coco(tmp_path / "data", images=2)
    register_coco_instances("by_path", {}, path, path.parent)
    try:
        checked(*on("by_path"))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"missing .*annotations\.json"):
            checked(*on("by_path"))
    finally:
        unregister("by_path")


def test_semantic_segmentation_needs_labels_of_pixels(tiny_coco) -> None:
    MetadataCatalog.get(tiny_coco).thing_classes = ["disc", "square"]
    with pytest.raises(ValueError, match=r"tiny_coco in DATASETS\.TRAIN has no stuff_classes"):
        checked(*on(tiny_coco, "MODEL.META_ARCHITECTURE", "DeepLab"))


DEEPLAB = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]


@contextmanager
def label_maps(folder: Path, count: int, value: int, name: str = "label_maps") -> Iterator[str]:
    """Registers a data set with one label map for each image, all of one value; yields its name."""
    folder.mkdir()
    records = []
    for index in range(count):
        files = [str(folder / f"{index:03d}{end}.png") for end in ("", "_labels")]
        for file, size in zip(files, (3, 1), strict=True):
            pixels = np.full((8, 9, size), value, np.uint8)
            Image.fromarray(pixels.squeeze()).save(file)
        record = dict(zip(("file_name", "sem_seg_file_name"), files, strict=True))
        records.append({**record, "height": 8, "width": 9})
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        stuff_classes=["a", "b"], ignore_label=255, evaluator_type="sem_seg"
    )
    try:
        yield name
    finally:
        unregister(name)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((8, 9), 3, np.uint8), r"\(14\): .*must have labels from 0 to 2, .* got 3 \(72 p"),
        (np.zeros((8, 7), np.uint8), r"\(14\): .*000_labels\.png has 7 x 8 pixels"),
        (np.full((8, 9, 3), [0, 90, 0], np.uint8), r"must be a label map of one channel, got 3"),
    ],
)
def test_a_sample_of_the_label_maps_is_read(
    pixels: np.ndarray, message: str, tmp_path: Path
) -> None:
    with label_maps(tmp_path / "data", 40, 2) as name:
        words = on(name, *DEEPLAB, "DATASETS.TEST", "()")
        checked(*words)
        for path in (tmp_path / "data").glob("*_labels.png"):
            Image.fromarray(pixels).save(path)
        with pytest.raises(UserError, match=f"label maps cannot be used, of 14 .*{message}"):
            checked(*words)
        checked(*words, stock_trainer=False)  # another mapper may read them
        with pytest.raises(UserError, match=r"DATASETS\.TEST: .*label maps cannot be used, of 14"):
            checked(*on(name), training=False)


FOUR = ("MODEL.PIXEL_MEAN", str([0.0] * 4), "MODEL.PIXEL_STD", str([1.0] * 4))


@pytest.mark.parametrize(
    ("file_name", "classes", "words"),
    [
        ("train.zip@/1.jpg", 1, ()),
        (17, 1, ()),  # a key of a database
        ("", 1, ("INPUT.FORMAT", "RGBD", *FOUR)),
        ("", 2, ()),  # of which the mapper makes one
    ],
)
def test_another_trainer_may_read_other_data(
    file_name: object, classes: int, words: tuple[str, ...], tmp_path: Path
) -> None:
    image = tmp_path / "a.png"
    Image.new("RGB", (9, 8)).save(image)
    item = {"bbox": [1, 1, 5, 5], "bbox_mode": BoxMode.XYWH_ABS, "category_id": classes - 1}
    record = {"height": 8, "width": 9, "annotations": [item]}
    record["file_name"] = file_name or str(image)
    DatasetCatalog.register("own_data", lambda: [record])
    MetadataCatalog.get("own_data").set(
        thing_classes=["disc", "square"][:classes], image_root="of another machine", gt_dir=[1]
    )
    words = (*words, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "DATASETS.TEST", "()")
    try:
        checked(*on("own_data", *words), stock_trainer=False)
        item["category_id"] = 90  # the mapper may map it
        checked(*on("own_data", *words), stock_trainer=False)
        item["bbox"] = [float("nan"), 1, 5, 5]
        with pytest.raises(UserError, match="a bbox that is not finite numbers"):
            checked(*on("own_data", *words), stock_trainer=False)
    finally:
        unregister("own_data")


def test_training_needs_pixels_that_are_not_ignored(tmp_path: Path, caplog) -> None:
    with (
        label_maps(tmp_path / "ignored", 3, 255) as name,
        label_maps(tmp_path / "labelled", 3, 1, "labelled") as other,
    ):
        with pytest.raises(UserError, match=r"ignored pixels only \(1\): all 3 that were read"):
            checked(*on(name, *DEEPLAB))
        words = on(name, *DEEPLAB, "DATASETS.TEST", "()")
        checked(*words, "DATASETS.TRAIN", f"('{name}', '{other}')")
        assert "ignored pixels only" in caplog.text
        Image.new("L", (9, 8)).save(tmp_path / "ignored/001_labels.png")
        caplog.clear()
        checked(*words)
        assert "ignored" not in caplog.text


def test_custom_architectures_and_data_sets_pass(tiny_coco) -> None:
    def build_custom_model(cfg) -> None:
        """A function, as registries allow."""

    META_ARCH_REGISTRY.register(build_custom_model)
    try:
        del MetadataCatalog.get(tiny_coco).evaluator_type
        MetadataCatalog.get(tiny_coco).thing_classes = ["disc"]
        checked(*on(tiny_coco, "MODEL.META_ARCHITECTURE", "build_custom_model"))
    finally:
        del META_ARCH_REGISTRY._obj_map["build_custom_model"]


def test_a_loader_of_ones_own_may_load_voc(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")  # not opened
    record = {"file_name": str(tmp_path / "0.png"), "image_id": "0", "height": 9, "width": 9}
    DatasetCatalog.register("own_voc", lambda: [{**record, "annotations": []}])
    MetadataCatalog.get("own_voc").set(thing_classes=["own", "b"], evaluator_type="pascal_voc")
    try:
        checked(*on("own_voc"))
    finally:
        unregister("own_voc")


def test_errors_of_a_loader_keep_their_traceback() -> None:
    DatasetCatalog.register("buggy", lambda: [int("abc")])
    try:
        with pytest.raises(ValueError, match="invalid literal") as caught:
            checked(*on("buggy"))
        assert not isinstance(caught.value, UserError)
    finally:
        unregister("buggy")


def test_custom_data_needs_two_paths_only(tmp_path: Path) -> None:
    paths = [write_tiny_coco(tmp_path / name, images=2) for name in ("a", "b")]
    train, test = ([str(path), str(path.parent)] for path in paths)
    cfg = read_config(arguments("MODEL.WEIGHTS", "", train_data=train, test_data=test))
    assert cfg.DATASETS.TRAIN == ("custom_train",) and cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    check_config(cfg, training=True)
    words = ["DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = read_config(arguments(*words, train_data=train, test_data=test))
    assert cfg.DATASETS.TEST == () and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2


def test_packages_of_evaluators_are_needed_before_training(tiny_coco, monkeypatch) -> None:
    monkeypatch.setitem(MetadataCatalog.get(tiny_coco).__dict__, "evaluator_type", "lvis")
    words = on(tiny_coco, "MODEL.ROI_HEADS.NUM_CLASSES", "2")
    monkeypatch.setitem(sys.modules, "lvis", ModuleType("lvis"))
    checked(*words)
    monkeypatch.delitem(sys.modules, "lvis")
    monkeypatch.setattr("dcn_plugin.engine.config_checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="the lvis evaluator of tiny_coco needs"):
        checked(*words)
    checked(*words, "DATASETS.TEST", "()")


def test_a_stock_backbone_with_deform_last_is_an_error(tiny_coco) -> None:
    words = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    with pytest.raises(ValueError, match=r"DEFORM_LAST .* backbone build_resnet_backbone ignores"):
        checked(*on(tiny_coco, *words))
    checked(*on(tiny_coco, *words, "MODEL.RESNETS.DEFORM_LAST", "[0, 0, 0, 0]"))


@pytest.mark.parametrize(
    ("config", "message"), [("", "--config-file is required"), ("model.py", "is a LazyConfig")]
)
def test_other_configs_are_an_error(config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(arguments(config=config))
