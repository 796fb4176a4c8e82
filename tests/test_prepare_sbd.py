# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Labels of VOC and SBD are written to one folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import prepare_sbd
import pytest
from PIL import Image

from tests.tiny_voc import write_tiny_sbd, write_tiny_voc


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """SBD, VOC 2012, and SBD's labels."""
    write_tiny_voc(tmp_path)
    sbd, voc = tmp_path / "benchmark_RELEASE", tmp_path / "VOC2012"
    return sbd, voc, write_tiny_sbd(sbd, voc)


def run(sbd: Path, voc: Path) -> None:
    prepare_sbd.main(["--sbd", str(sbd), "--voc", str(voc)])


def test_labels_of_both_are_written(folders, capsys) -> None:
    sbd, voc, labels = folders
    run(sbd, voc)
    assert capsys.readouterr().out.startswith("4 training images")
    names = (voc / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    # VOC's train (0, 1), and SBD's (1 to 4) without VOC's val (4, 5).
    assert names == [f"2012_{number:06d}" for number in range(4)]
    for number in range(6):
        name = f"2012_{number:06d}"
        found = Image.open(voc / f"SegmentationClassAug/{name}.png")
        assert found.mode == "L"
        if number in (2, 3):
            expected = labels[name]
        else:
            expected = np.asarray(Image.open(voc / f"SegmentationClass/{name}.png"))
        assert np.array_equal(np.asarray(found), expected), name


def test_a_second_run_writes_what_is_missing(folders) -> None:
    sbd, voc, _ = folders
    run(sbd, voc)
    paths = sorted((voc / "SegmentationClassAug").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    run(sbd, voc)
    after = [path.stat().st_mtime_ns for path in paths]
    assert after[1:] == before[1:] and after[0] != before[0]


def test_missing_files_are_errors(folders) -> None:
    sbd, voc, _ = folders
    (sbd / "dataset/cls/2012_000002.mat").unlink()
    with pytest.raises(SystemExit, match=r"prepare_sbd: 1 files do not exist, .*2012_000002\.mat"):
        run(sbd, voc)
    assert not (voc / "SegmentationClassAug").exists()
    with pytest.raises(SystemExit, match=r"val\.txt does not exist"):
        run(sbd, voc / "nowhere")


@pytest.mark.parametrize("content", [b"nothing", b""])
def test_a_damaged_file_is_an_error(folders, content: bytes) -> None:
    sbd, voc, _ = folders
    (sbd / "dataset/cls/2012_000002.mat").write_bytes(content)
    with pytest.raises(
        SystemExit, match=r"prepare_sbd: .*2012_000002\.mat is not a .mat file of SBD"
    ):
        run(sbd, voc)


def test_damaged_lists_and_images_are_errors(folders) -> None:
    sbd, voc, _ = folders
    (voc / "SegmentationClass/2012_000000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(SystemExit, match=r"2012_000000\.png is not an image, or damaged"):
        run(sbd, voc)
    (sbd / "dataset/val.txt").write_bytes(b"\x89\xff")
    with pytest.raises(SystemExit, match=r"prepare_sbd: .*val\.txt must be a text file of image n"):
        run(sbd, voc)


def test_unknown_labels_are_errors(folders) -> None:
    sbd, voc, _ = folders
    path = voc / "SegmentationClass/2012_000000.png"
    Image.fromarray(np.full((96, 96), 77, np.uint8), mode="L").save(path)
    with pytest.raises(SystemExit, match=r"2012_000000\.png must have .* got \[77\]"):
        run(sbd, voc)
