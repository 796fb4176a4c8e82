# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""IoU at the size of the image and at the model's input size, compared with a slow version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator, sem_seg_evaluation

from dcn_plugin import add_dcn_config
from dcn_plugin.data.faults import DataError
from dcn_plugin.engine import Trainer
from dcn_plugin.evaluation import (
    MeanIoUEvaluator,
    NetworkSizeSemSegEvaluator,
    build_evaluator,
)
from tests.datasets import data_sets_in, unregister
from tests.tiny_voc import write_tiny_cityscapes

NAME = "cityscapes_fine_sem_seg_train"
CLASSES = 19


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Iterator[Path]:
    """Registers a generated Cityscapes."""
    write_tiny_cityscapes(tmp_path)
    with data_sets_in(str(tmp_path)):
        yield tmp_path


def config(at_network_size: bool) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.TEST.SEM_SEG_AT_NETWORK_SIZE = at_network_size
    cfg.INPUT.MIN_SIZE_TEST = 40
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def slow_iou(predictions: list[np.ndarray], ground_truths: list[np.ndarray]) -> dict[int, float]:
    """Returns the IoU in percent of each class that occurs in the ground truth."""
    found = {}
    for label in range(CLASSES):
        intersection = union = occurs = 0
        for predicted, ground_truth in zip(predictions, ground_truths, strict=True):
            valid = ground_truth != 255
            ours, theirs = (predicted == label) & valid, ground_truth == label
            intersection += int((ours & theirs).sum())
            union += int((ours | theirs).sum())
            occurs += int(theirs.sum())
        if occurs:
            found[label] = 100 * intersection / union
    return found


@pytest.mark.parametrize("at_network_size", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_implementation(at_network_size: bool, seed: int, tmp_path: Path) -> None:
    cfg = config(at_network_size)
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "results"))
    assert isinstance(evaluator, NetworkSizeSemSegEvaluator) == at_network_size
    evaluator.reset()
    rng = np.random.default_rng(seed)
    predictions, ground_truths = [], []
    for (item,) in Trainer.build_test_loader(cfg, NAME):
        size = item["height"], item["width"]
        assert size == ((40, 40) if at_network_size else (96, 96))
        record = next(r for r in DatasetCatalog.get(NAME) if r["file_name"] == item["file_name"])
        with Image.open(record["sem_seg_file_name"]) as image:
            resized = image.resize(size[::-1], Image.Resampling.NEAREST)
            ground_truths.append(np.asarray(resized))
        random_labels = rng.integers(0, CLASSES, size)
        predicted = np.where(rng.random(size) < 0.7, ground_truths[-1], random_labels)
        predicted[predicted == 255] = 4
        predictions.append(predicted)
        scores = torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), CLASSES)
        evaluator.process([item], [{"sem_seg": scores.permute(2, 0, 1).float()}])
    results = evaluator.evaluate()["sem_seg"]
    names = MetadataCatalog.get(NAME).stuff_classes
    expected = slow_iou(predictions, ground_truths)
    assert len(expected) >= 3
    for label, iou in expected.items():
        assert results[f"IoU-{names[label]}"] == pytest.approx(iou) and 0 < iou < 100
        # Of Detectron2's main only.
        assert np.isfinite(results.get(f"BoundaryIoU-{names[label]}", 0.0))


def test_process_is_detectron2s(monkeypatch, tmp_path: Path) -> None:
    """Detectron2's own `process` runs, so that what main adds (boundary IoU) is computed too."""
    shapes = []

    def process(self, inputs, outputs) -> None:
        shapes.append(read_as_detectron2(self, inputs[0]["file_name"]).shape)

    monkeypatch.setattr(SemSegEvaluator, "process", process)
    cfg = config(at_network_size=True)
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "found"))
    evaluator.reset()
    (item,) = next(iter(Trainer.build_test_loader(cfg, NAME)))
    evaluator.process([item], [{"sem_seg": torch.zeros(CLASSES, 40, 40)}])
    assert shapes == [(40, 40)]


def read_as_detectron2(evaluator: SemSegEvaluator, image: str) -> np.ndarray:
    """Reads labels as Detectron2's `process` does."""
    path = evaluator.input_file_to_gt_file[image]
    if hasattr(sem_seg_evaluation, "load_image_into_numpy_array"):  # main
        return evaluator.sem_seg_loading_fn(path, dtype=int)
    with Image.open(path) as labels:
        return np.array(labels, dtype=int)


@pytest.mark.parametrize("at_network_size", [False, True])
def test_label_maps_are_read_once_by_the_given_function(
    at_network_size: bool, monkeypatch, tmp_path: Path
) -> None:
    """As Detectron2's main, whose `sem_seg_loading_fn` may read files that are no images."""
    kind = NetworkSizeSemSegEvaluator if at_network_size else MeanIoUEvaluator
    read, seen = [], []

    def load(path: str, dtype: type) -> np.ndarray:
        read.append(path)
        return np.load(path).astype(dtype)

    def process(self, inputs, outputs) -> None:
        seen.append(read_as_detectron2(self, inputs[0]["file_name"]))

    monkeypatch.setattr(SemSegEvaluator, "process", process)
    evaluator = kind(NAME, output_dir=str(tmp_path / "found"), sem_seg_loading_fn=load)
    evaluator.reset()
    item = next(iter(Trainer.build_test_loader(config(at_network_size), NAME)))[0]
    path = evaluator.input_file_to_gt_file[item["file_name"]] = str(tmp_path / "labels.npy")
    np.save(path, np.arange(96 * 96).reshape(96, 96) % CLASSES)
    logits = torch.zeros(CLASSES, item["height"], item["width"])
    evaluator.process([item], [{"sem_seg": logits}])
    assert read == [path] == [evaluator.input_file_to_gt_file[item["file_name"]]]
    assert evaluator.sem_seg_loading_fn is load
    assert seen[0].shape == logits.shape[1:]
    if not at_network_size:
        assert (seen[0] == np.load(path)).all()
    np.save(path, np.full((96, 96), 40))
    with pytest.raises(DataError, match=r"labels\.npy must have labels from 0 to 18"):
        evaluator.process([item], [{"sem_seg": logits}])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_labels_above_255_are_compared(dtype: type, tmp_path: Path) -> None:
    ground_truth = np.repeat(np.arange(0, 64, dtype=dtype), 64).reshape(64, 64) + dtype(240)
    Image.fromarray(ground_truth).save(tmp_path / "labels.tiff")
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    files = {"file_name": "image.png", "sem_seg_file_name": "labels.tiff"}
    record = {name: str(tmp_path / file) for name, file in files.items()}
    DatasetCatalog.register("many_classes", lambda: [{**record, "height": 64, "width": 64}])
    classes = [str(label) for label in range(304)]
    MetadataCatalog.get("many_classes").set(
        stuff_classes=classes, ignore_label=65535, evaluator_type="sem_seg"
    )
    try:
        cfg = config(at_network_size=True)
        evaluator = build_evaluator(cfg, "many_classes", str(tmp_path / "results"))
        evaluator.reset()
        (item,) = next(iter(Trainer.build_test_loader(cfg, "many_classes")))
        # Pillow rounds positions in images of 16 bits in another way than in others.
        resized = Image.fromarray(ground_truth.astype(np.int32)).resize(
            (40, 40), Image.Resampling.NEAREST
        )
        labels = torch.from_numpy(np.array(resized, dtype=int))
        scores = torch.nn.functional.one_hot(labels, len(classes)).permute(2, 0, 1)
        evaluator.process([item], [{"sem_seg": scores}])
        results = evaluator.evaluate()["sem_seg"]
    finally:
        unregister("many_classes")
    assert results["mIoU"] == 100 and results["IoU-303"] == 100


@pytest.mark.parametrize("predicted", [[0, 1], [0, 1, 2]], ids=["in ground truth", "others too"])
def test_the_classes_of_the_mean_are_logged(predicted, tmp_path, caplog) -> None:
    evaluator = build_evaluator(config(at_network_size=False), NAME, str(tmp_path))
    evaluator.reset()
    for label in predicted:
        evaluator._conf_matrix[label, 0] = 1  # rows are predicted, columns the ground truth
    evaluator._conf_matrix[1, 1] = 2
    with caplog.at_level("INFO", logger="dcn_plugin"):
        results = evaluator.evaluate()["sem_seg"]
    ious = [results[f"IoU-{name}"] for name in MetadataCatalog.get(NAME).stuff_classes[:2]]
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("dcn_plugin")]
    assert message.startswith("mIoU is the mean over the 2 classes in the ground truth")
    if results["mIoU"] == pytest.approx(sum(ious) / 2):
        assert message.endswith("ground truth")
    else:  # Detectron2 0.6
        assert results["mIoU"] == pytest.approx(sum(ious) / 3)
        assert message.endswith(
            "and 1 that are only predicted, which count as 0 (Detectron2 0.6); without these it is "
            f"{sum(ious) / 2:.4f}"
        )


@pytest.mark.parametrize("at_network_size", [False, True])
def test_labels_outside_the_classes_are_an_error(at_network_size: bool, tmp_path: Path) -> None:
    cfg = config(at_network_size)
    (item,) = next(iter(Trainer.build_test_loader(cfg, NAME)))
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "results"))
    path = Path(evaluator.input_file_to_gt_file[item["file_name"]])
    logits = torch.zeros(CLASSES, item["height"], item["width"])

    def error_for(labels: np.ndarray) -> str:
        evaluator.reset()
        Image.fromarray(labels).save(path)
        with pytest.raises(DataError) as error:
            evaluator.process([item], [{"sem_seg": logits}])
        return str(error.value)

    labels = np.asarray(Image.open(path)).copy()
    labels[:10] = 40
    pixels = (labels == 40).sum() if not at_network_size else r"\d+"
    expected = rf"labels from 0 to 18, or 255 .* got 40 \({pixels} pixels\)"
    assert re.search(f"{re.escape(str(path))} must have {expected}", error_for(labels))
    path.write_bytes(path.read_bytes()[:60])
    evaluator.reset()
    with pytest.raises(DataError, match=f"{re.escape(str(path))} cannot be read as a label map"):
        evaluator.process([item], [{"sem_seg": logits}])
    if not at_network_size:
        assert f"{path} has 50 x 96 pixels" in error_for(np.zeros((50, 96), np.uint8))


def test_a_test_set_of_ignored_pixels_only_is_a_warning(tmp_path: Path, caplog) -> None:
    cfg = config(at_network_size=False)
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "results"))
    evaluator.reset()
    for (item,) in Trainer.build_test_loader(cfg, NAME):
        path = evaluator.input_file_to_gt_file[item["file_name"]]
        Image.fromarray(np.full((96, 96), 255, np.uint8)).save(path)
        evaluator.process([item], [{"sem_seg": torch.zeros(CLASSES, 96, 96)}])
    assert np.isnan(evaluator.evaluate()["sem_seg"]["mIoU"])
    assert "no pixel counts: all labels are 255, which is ignored" in caplog.text


def test_logits_that_are_not_finite_are_replaced_and_counted(tmp_path: Path, caplog) -> None:
    cfg = config(at_network_size=False)
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "results"))

    def evaluate(spoil) -> dict[str, float]:
        evaluator.reset()
        for (item,) in Trainer.build_test_loader(cfg, NAME):
            path = evaluator.input_file_to_gt_file[item["file_name"]]
            labels = np.asarray(Image.open(path)).astype(np.int64)
            labels[labels == 255] = 4
            logits = torch.nn.functional.one_hot(torch.from_numpy(labels), CLASSES)
            logits = logits.permute(2, 0, 1).float()
            spoil(logits)
            evaluator.process([item], [{"sem_seg": logits}])
        return evaluator.evaluate()["sem_seg"]

    assert evaluate(lambda logits: None)["mIoU"] == 100
    assert "NaN" not in caplog.text

    def spoil_one_class(logits: torch.Tensor) -> None:
        logits[18, :3] = torch.nan  # argmax would return it
        logits[17, 3:6] = torch.inf

    assert evaluate(spoil_one_class)["mIoU"] == 100
    assert f"{4 * 6 * 96} pixels have a logit that is NaN or infinite" in caplog.text

    def spoil_pixels(logits: torch.Tensor) -> None:
        logits[:, :48] = torch.nan

    results = evaluate(spoil_pixels)
    assert 0 < results["pACC"] < 100 and results["mIoU"] < 60
    assert sum(evaluator._conf_matrix[:, :-1].diagonal()) < evaluator._conf_matrix[:, :-1].sum()
