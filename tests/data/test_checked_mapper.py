# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Images and label maps that cannot be used: one line, with the file and the cause."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetMapper, build_detection_test_loader

from dcn_plugin.data.checked_mapper import CheckedMapper
from dcn_plugin.data.faults import DataError
from dcn_plugin.data.file_checks import clipped_fault, label_map_fault, read_label_map


def write_record(folder: Path) -> dict:
    """Writes an image and a label map; returns their record."""
    rng = np.random.default_rng(0)
    image, labels = folder / "image.jpg", folder / "labels.png"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(image)
    Image.fromarray(rng.integers(0, 3, (40, 60), np.uint8)).save(labels)
    size = {"height": 40, "width": 60}
    return {"file_name": str(image), "sem_seg_file_name": str(labels), "image_id": 1, **size}


def mapper(num_labels: int | None = 3) -> CheckedMapper:
    stock = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    return CheckedMapper(stock, num_labels)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:40] = bytes(40)
    path.write_bytes(data)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (Path.unlink, "No such file or directory"),
    "truncated": (truncate, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty, cut off or of an unknown format"),
    "text": (lambda path: path.write_text("<html>404</html>"), "empty, cut off or of an unknown"),
    "header": (flip_bytes, "cut off or of an unknown format"),
    "folder": (make_folder, "Is a directory"),
    "size": (
        lambda path: Image.new("L", (60, 50)).save(path),
        r"has 60 x 50 pixels \(width x height\), but its (annotation says|image has) 60 x 40",
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_image_is_named(fault: str, workers: int, tmp_path: Path) -> None:
    record = write_record(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(Path(record["file_name"]))
    loader = build_detection_test_loader([record], mapper=mapper(), num_workers=workers)
    with pytest.raises(DataError) as error:
        list(loader)
    assert re.fullmatch(f"{re.escape(record['file_name'])} .*{message}.*", str(error.value))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_label_map_is_named(fault: str, tmp_path: Path) -> None:
    record = write_record(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(Path(record["sem_seg_file_name"]))
    expected = f"{re.escape(record['sem_seg_file_name'])} .*{message}.*"
    with pytest.raises(DataError) as error:
        mapper()(record)
    assert re.fullmatch(expected, str(error.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    Path(record["file_name"]).chmod(0)
    with pytest.raises(DataError, match=r"image\.jpg cannot be read as an image: Permission"):
        mapper()(record)


def test_labels_outside_the_classes_are_named(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    assert mapper()(record)["sem_seg"].max() == 2
    message = r"labels\.png must have labels from 0 to 1, or 255 .* got 2 \(\d+ pixels\)"
    with pytest.raises(DataError, match=message):
        mapper(2)(record)
    labels = np.asarray(Image.open(record["sem_seg_file_name"])).copy()
    labels[labels == 2] = 255
    Image.fromarray(labels).save(record["sem_seg_file_name"])
    assert set(mapper(2)(record)["sem_seg"].unique().tolist()) == {0, 1, 255}
    assert mapper(None)(record) is not None


def test_a_size_before_rotation_is_named(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    exif = Image.Exif()
    exif[274] = 6  # orientation: a quarter turn
    Image.new("RGB", (60, 40)).save(record["file_name"], exif=exif)
    with pytest.raises(DataError, match=r"has 40 x 60 pixels .* 60 x 40, as before .* EXIF data"):
        mapper()(record)


def in_mode(mode: str) -> Image.Image:
    """Returns labels 0, 1 and 2 in a mode of Pillow."""
    labels = np.arange(2400, dtype=np.uint8).reshape(40, 60) % 3
    if mode in ("P", "grey P"):
        image = Image.fromarray(labels, mode="P")
        grey = [value for value in range(256) for _ in range(3)]
        image.putpalette(grey if mode == "grey P" else [0, 0, 0, 128, 0, 0, 0, 128, 0])
        return image
    if mode == "colours":
        return Image.fromarray(np.stack([labels * 100, labels, labels], axis=2))
    if mode.startswith("I;16"):
        return Image.fromarray(labels.astype(np.uint16) * (400 if mode == "I;16 large" else 1))
    return Image.fromarray(labels % 2 * 255 if mode == "1" else labels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("P", "labels.png is a palette image, whose indices .*: it reads the grey value 38 for 1"),
        ("1", "labels.png is an image of mode 1, whose values .* the grey value 255 for 1"),
        ("I;16 large", "labels.png is an image of mode I;16, .* the grey value 255 for 400"),
        ("grey P", None),
        ("RGB", None),
        ("LA", None),
        ("I;16", None),
        ("L", None),
    ],
)
def test_labels_that_are_read_in_grey(mode: str, message: str | None, tmp_path: Path) -> None:
    record = write_record(tmp_path)
    in_mode(mode).save(record["sem_seg_file_name"])
    fault, _ = label_map_fault(record, None, 255, ("train",))
    if message is None:
        assert fault is None and set(mapper(3)(record)["sem_seg"].unique().tolist()) == {0, 1, 2}
        return
    assert re.search(message, fault)
    for num_labels in (3, 256):
        with pytest.raises(DataError, match=message):
            mapper(num_labels)(record)

    def own_mapper(dataset_dict: dict) -> dict:
        labels = read_label_map(dataset_dict["sem_seg_file_name"], dtype=int)
        return {"image": torch.zeros(3, 40, 60), "sem_seg": torch.from_numpy(labels)}

    assert CheckedMapper(own_mapper, 1000)(record) is not None


def test_colours_are_no_labels(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    in_mode("colours").save(record["sem_seg_file_name"])
    for num_labels in (None, 256):
        with pytest.raises(
            DataError, match=r"labels\.png must be a label map of one channel, got 3"
        ):
            mapper(num_labels)(record)
    for splits in (("train",), ("test",)):
        fault, _ = label_map_fault(record, None, 255, splits)
        assert "must be a label map of one channel, got 3" in fault
    in_mode("RGB").save(record["sem_seg_file_name"])
    assert "one channel" in label_map_fault(record, None, 255, ("test",))[0]


def test_a_mapper_may_read_labels_from_colours_and_return_an_array(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    in_mode("colours").save(record["sem_seg_file_name"])

    class ColourMapper(DatasetMapper):
        def __call__(self, dataset_dict: dict) -> dict:
            labels = np.zeros((40, 60), np.int64) + 30  # one of the grey values
            return {"image": torch.zeros(3, 40, 60), "sem_seg": labels}

    own = ColourMapper(is_train=True, augmentations=[], image_format="BGR")
    assert (CheckedMapper(own, 31)(record)["sem_seg"] == 30).all()
    with pytest.raises(DataError, match=r"labels\.png must have labels from 0 to 29"):
        CheckedMapper(own, 30)(record)


@pytest.mark.parametrize(
    "mapped",
    [
        {"image": torch.zeros(3, 40, 60), "sem_seg": torch.zeros(10, 15)},  # stride 4
        {"image": torch.zeros(3, 40, 60), "sem_seg": torch.zeros(19, 40, 60)},  # one-hot
        {"inputs": torch.zeros(3, 40, 60), "sem_seg": torch.zeros(40, 60)},
    ],
)
def test_a_mapper_may_return_labels_in_a_form_of_its_own(mapped: dict, tmp_path: Path) -> None:
    assert CheckedMapper(lambda record: mapped, 19)(write_record(tmp_path)) is mapped


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        (
            np.uint16,
            1000,
            r"mode I;16, which Detectron2 clips .*: it reads 255 for 1000\. Scale",
        ),
        (np.int32, 1000, "mode I, which Detectron2 clips .*: it reads 255 for 1000"),
        (np.float32, 0.25, r"mode F, which Detectron2 clips .*: it reads 0 for 0\.25"),
        (np.uint16, 1, None),
        (np.float32, 1, None),
        (np.uint8, 1, None),
    ],
)
def test_images_of_more_than_8_bits_are_clipped(
    dtype: type, scale: float, message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "image.tiff"
    Image.fromarray((np.arange(200).reshape(10, 20) * scale).astype(dtype)).save(path)
    fault = clipped_fault(str(path))
    assert fault is None if message is None else re.search(message, fault)
    read = DatasetMapper(is_train=False, augmentations=[], image_format="RGB")
    mapped = read({"file_name": str(path)})["image"][0].numpy()
    assert np.array_equal(mapped, np.asarray(Image.open(path))) == (fault is None)


def test_other_errors_pass(tmp_path: Path) -> None:
    record = write_record(tmp_path)

    def fail(dataset_dict: dict) -> None:
        raise ValueError("an error of the mapper")

    with pytest.raises(ValueError, match="an error of the mapper") as error:
        CheckedMapper(fail)(record)
    assert not isinstance(error.value, DataError)
    assert CheckedMapper(lambda dataset_dict: None, 3)(record) is None
    assert torch.equal(mapper()(record)["image"], mapper().mapper(record)["image"])
