# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""VOC's average precision, compared with a slow implementation on random detections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from dcn_plugin.evaluation import VOCEvaluator
from tests.datasets import data_sets_in
from tests.engine.test_trainer import Remote
from tests.tiny_voc import SIZE, write_tiny_voc

NAME = "voc_2007_trainval"
BIRD, CAR = (CLASS_NAMES.index(name) for name in ("bird", "car"))


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Registers generated VOC 2007 and 2012."""
    folder = tmp_path_factory.mktemp("voc")
    write_tiny_voc(folder)
    with data_sets_in(str(folder)):
        yield folder


def ground_truth(name: str) -> list[tuple[str, int, list[float], bool]]:
    """Returns image, class, box and whether it is difficult: the second of an image is."""
    return [
        (record["image_id"], item["category_id"], item["bbox"], number == 1)
        for record in DatasetCatalog.get(name)
        for number, item in enumerate(record["annotations"])
    ]


def random_detections(seed: int, name: str = NAME) -> list[tuple[str, int, list[float], float]]:
    """Returns image, class, box and score of detections near and far; scores are unique."""
    rng = np.random.default_rng(seed)
    found = []
    for image, kind, box, _ in ground_truth(name):
        for scale in (1, 6, 12):
            moved = np.round(np.array(box) + rng.normal(0, scale, 4), 1)
            label = kind if rng.random() < 0.8 else BIRD + CAR - kind
            found.append((image, label, np.clip(moved, 0, SIZE).tolist()))
    scores = rng.permutation(np.arange(1, 1000))[: len(found)] / 1000
    return [(*item, float(score)) for item, score in zip(found, scores, strict=True)]


def evaluate(detections: list, folder: Path | str, name: str = NAME) -> dict[str, float]:
    evaluator = VOCEvaluator(name, str(folder))
    evaluator.reset()
    for image in {record["image_id"] for record in DatasetCatalog.get(name)}:
        mine = [item for item in detections if item[0] == image]
        instances = Instances(
            (SIZE, SIZE),
            pred_boxes=Boxes(torch.tensor([m[2] for m in mine]).reshape(-1, 4)),
            pred_classes=torch.tensor([m[1] for m in mine], dtype=torch.int64),
            scores=torch.tensor([m[3] for m in mine]),
        )
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def overlap(a: list[float], b: list[float]) -> float:
    """Returns the IoU as VOC computes it: 1-based pixel coordinates, both ends inclusive."""
    a, b = ([box[0] + 1, box[1] + 1, box[2], box[3]] for box in (a, b))
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def slow_precision(
    detections: list, kind: int, least: float, use_07_metric: bool, name: str
) -> float:
    """Computes AP of one class as VOC's development kit describes it."""
    objects = [list(item) for item in ground_truth(name) if item[1] == kind]
    wanted = sum(not item[3] for item in objects)
    taken, hits, curve = set(), 0, []
    ranked = sorted((d for d in detections if d[1] == kind), key=lambda d: -d[3])
    judged = 0
    for image, _, box, _ in ranked:
        best = max(
            ((overlap(box, o[2]), i) for i, o in enumerate(objects) if o[0] == image),
            default=(0.0, -1),
        )
        if best[0] > least and objects[best[1]][3]:
            continue  # ignored
        judged += 1
        if best[0] > least and best[1] not in taken:
            taken.add(best[1])
            hits += 1
        curve.append((hits / wanted, hits / judged))
    if use_07_metric:
        levels = np.arange(0, 1.1, 0.1)
        return sum(max((p for r, p in curve if r >= t), default=0) for t in levels) / 11
    area, reached = 0.0, 0.0
    for number, (recall, _) in enumerate(curve):
        area += (recall - reached) * max(p for _, p in curve[number:])
        reached = recall
    return area


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_implementation(seed: int, tmp_path: Path) -> None:
    detections = random_detections(seed)
    found = evaluate(detections, tmp_path)
    for rule, use_07_metric in (("11point", True), ("area", False)):
        for percent in (50, 70):
            slow = [
                slow_precision(detections, kind, percent / 100, use_07_metric, NAME)
                for kind in (BIRD, CAR)
            ]
            assert found[f"AP{percent}-{rule}"] == pytest.approx(100 * np.mean(slow)), rule
    assert 0 < found["AP70"] < found["AP50"] < 100
    assert found["AP50"] == found["AP50-11point"] and found["AP70"] == found["AP70-11point"]


def test_years_after_2007_use_the_area(tmp_path: Path) -> None:
    found = evaluate(random_detections(1, "voc_2012_trainval"), tmp_path, "voc_2012_trainval")
    assert found["AP50"] == found["AP50-area"] != found["AP50-11point"]


def test_classes_without_ground_truth_are_ignored(tmp_path: Path) -> None:
    perfect = [(image, kind, box, 0.9) for image, kind, box, _ in ground_truth(NAME)]
    found = evaluate(perfect, tmp_path)
    for metric in ("AP", "AP50", "AP70", "AP50-bird", "AP50-area"):
        assert found[metric] == pytest.approx(100), metric
    assert "AP50-cat" not in found


def test_no_detections_at_all(tmp_path: Path) -> None:
    found = evaluate([], tmp_path)
    assert found["AP50"] == found["AP70"] == found["AP"] == 0


@pytest.mark.parametrize("remote", [False, True])
def test_detections_are_written_for_the_evaluation_server(
    remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PathManager, "_path_handlers", {**PathManager._path_handlers})
    PathManager.register_handler(Remote(tmp_path))
    detections = random_detections(2)
    metrics = evaluate(detections, "remote://" if remote else tmp_path)
    assert metrics["AP50"] > 0
    lines = (tmp_path / f"comp4_det_{NAME}_bird.txt").read_text().splitlines()
    expected = {
        f"{image} {score:.3f} {x1 + 1:.1f} {y1 + 1:.1f} {x2:.1f} {y2:.1f}"
        for image, kind, (x1, y1, x2, y2), score in detections
        if kind == BIRD
    }
    assert set(lines) == expected
    assert (tmp_path / f"comp4_det_{NAME}_cat.txt").read_text() == ""


@pytest.fixture
def restored_annotations(root: Path) -> Iterator[Path]:
    """Yields the XML files of VOC 2007, and restores them."""
    folder = root / "VOC2007/Annotations"
    contents = {path: path.read_text() for path in folder.iterdir()}
    yield folder
    for path, text in contents.items():
        path.write_text(text)
    parse_rec.cache_clear()


def test_fractions_and_absent_elements_are_evaluated(
    restored_annotations: Path, tmp_path: Path
) -> None:
    detections = random_detections(3)
    expected = evaluate(detections, tmp_path)
    parse_rec.cache_clear()
    for path in restored_annotations.iterdir():
        text = path.read_text()
        text = text.replace("<pose>Left</pose><truncated>0</truncated>", "")
        text = text.replace("<difficult>0</difficult>", "").replace("</xmin>", ".3</xmin>")
        path.write_text(text)
    image_set = restored_annotations.parent / "ImageSets/Main/trainval.txt"
    names = image_set.read_text()
    image_set.write_text(names.replace("\n", "  # a comment\n\n", 1))
    try:
        assert evaluate(detections, tmp_path) == expected
    finally:
        image_set.write_text(names)
    assert parse_rec.cache_info().currsize == 0


def test_detections_that_are_not_finite_are_dropped(tmp_path: Path, caplog) -> None:
    detections = random_detections(4)
    expected = evaluate(detections, tmp_path)
    image, kind, box, _ = detections[0]
    nan = float("nan")
    more = [(image, kind, [nan, *box[1:]], 1.0), (image, kind, box, nan)]
    assert evaluate(detections + more, tmp_path) == expected
    assert "Dropped 2 detections" in caplog.text
