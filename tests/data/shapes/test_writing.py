# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The files of a split: complete or absent, reproducible, in a folder for each settings."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dcn_plugin import files
from dcn_plugin.data import workers
from dcn_plugin.data.shapes import NAMES, SETS, Settings, writing
from dcn_plugin.data.shapes.drawing import draw_image
from dcn_plugin.data.shapes.registration import split_folder
from dcn_plugin.messages import UserError

TINY = replace(SETS["tiny"], train=6, val=3)


def generate(folder: Path, settings: Settings, split: str) -> Path:
    folder = split_folder(str(folder), "custom", settings, split)
    writing.generate_split(folder, "custom", settings, split)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_files_match_the_drawing(tmp_path: Path) -> None:
    folder = generate(tmp_path, TINY, "train")
    content = json.loads((folder / "annotations.json").read_text())
    assert [item["name"] for item in content["categories"]] == list(NAMES)
    assert len(content["images"]) == 6
    assert content["info"]["settings"]["seed"] == TINY.seed
    for index, image in enumerate(content["images"]):
        drawn = draw_image(TINY, np.random.default_rng([TINY.seed, 0, index]))
        read = cv2.imread(str(folder / "images" / image["file_name"]))
        assert np.abs(read.astype(int) - drawn.image).mean() < 6  # JPEG
        labels = cv2.imread(str(folder / f"labels/{index:06d}.png"), cv2.IMREAD_UNCHANGED)
        annotations = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        assert [item["category_id"] - 1 for item in annotations] == drawn.classes
        for number, item in enumerate(annotations):
            mask = drawn.instance_ids == number + 1
            assert (labels[mask] == item["category_id"]).all() and item["area"] == mask.sum()
            left, top, width, height = item["bbox"]
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask[top].any() and mask[top + height - 1].any()
            assert mask[:, left].any() and mask[:, left + width - 1].any()
        assert (labels[drawn.instance_ids == 0] == 0).all()


@pytest.mark.parametrize(
    ("level", "index", "boxes", "colour"),
    [
        (
            "tiny",
            0,
            {"zigzag": [3, 29, 33, 27], "fork": [23, 5, 40, 24]},
            [76.1, 60.1, 74.7],
        ),
        ("tiny", 2, {"zigzag": [18, 7, 46, 54]}, [71.5, 53.9, 79.2]),
        (
            "hard",
            0,
            {"zigzag": [22, 58, 56, 59], "fork": [31, 7, 26, 53]},
            [37.1, 62.3, 70.6],
        ),
    ],
)
def test_drawing_does_not_change(level: str, index: int, boxes: dict, colour: list[float]) -> None:
    """If this fails, the drawing code has changed: increase VERSION, then update these numbers."""
    assert writing.VERSION == 2
    item = writing.EncodedImages(SETS[level], "train")[index]
    found = {NAMES[a["category_id"] - 1]: a["bbox"] for a in item["annotations"]}
    assert list(found) == list(boxes)
    # Other builds of OpenCV may round differently.
    for name, box in boxes.items():
        assert np.abs(np.subtract(found[name], box)).max() <= 1
    image = cv2.imdecode(np.frombuffer(item["image"], np.uint8), cv2.IMREAD_COLOR)
    assert np.allclose(image.mean((0, 1)), colour, atol=0.5)


def test_splits_have_different_images(tmp_path: Path) -> None:
    train, val = (generate(tmp_path, TINY, split) for split in ("train", "val"))
    assert len(list((val / "images").iterdir())) == 3
    images = {path.read_bytes() for folder in (train, val) for path in folder.glob("images/*")}
    assert len(images) == 9


def test_workers_change_nothing(tmp_path: Path, monkeypatch) -> None:
    first = contents(generate(tmp_path / "a", TINY, "train"))
    monkeypatch.setattr(writing, "MIN_IMAGES_FOR_WORKERS", 1)
    assert contents(generate(tmp_path / "b", TINY, "train")) == first


def test_workers_without_sched_getaffinity(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")  # macOS and Windows do not have it
    monkeypatch.setattr(writing, "MIN_IMAGES_FOR_WORKERS", 1)
    assert len(contents(generate(tmp_path, TINY, "val"))) == 2 * 3 + 1


def test_existing_files_stay_and_other_settings_have_other_folders(
    tmp_path: Path, monkeypatch
) -> None:
    folder = generate(tmp_path, TINY, "val")
    before = (folder / "annotations.json").stat().st_mtime_ns
    assert generate(tmp_path, TINY, "val") == folder
    assert (folder / "annotations.json").stat().st_mtime_ns == before
    others = {generate(tmp_path, replace(TINY, bend=5.0), "val")}
    monkeypatch.setattr(f"{writing.__package__}.sets.VERSION", 99)
    others.add(generate(tmp_path, TINY, "val"))
    assert len(others | {folder}) == 3


@pytest.mark.parametrize("processes", ["one", "several"])
def test_an_interrupt_leaves_no_files(tmp_path: Path, monkeypatch, processes: str) -> None:
    written = []

    def interrupted(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 5:
            raise KeyboardInterrupt
        with path.open("wb") as file:
            file.write(data)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    if processes == "several":
        monkeypatch.setattr(writing, "MIN_IMAGES_FOR_WORKERS", 1)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, TINY, "train")
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]
    monkeypatch.undo()
    assert len(contents(generate(tmp_path, TINY, "train"))) == 2 * 6 + 1


MANY = replace(TINY, train=5000)


# Forked: a spawned process would import PyTorch and Detectron2 first.
FORK = multiprocessing.get_context("fork")


def generate_many(folder: Path) -> None:
    cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork
    generate(folder, MANY, "train")


def test_a_killed_process_leaves_no_split(tmp_path: Path) -> None:
    process = FORK.Process(target=generate_many, args=(tmp_path,))
    process.start()
    while process.is_alive() and len(list(tmp_path.glob("**/*.tmp/images/*"))) < 10:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not split_folder(str(tmp_path), "custom", MANY, "train").exists()


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch) -> None:
    def write_bytes(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # write(2) names no file

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    message = f"{tmp_path}.* cannot be generated, No space left .* DETECTRON2_DATASETS to a folder"
    with pytest.raises(UserError, match=message):
        generate(tmp_path, TINY, "val")
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_left_by_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = split_folder(str(tmp_path), "custom", TINY, "val")
    unfinished = folder.with_suffix(".tmp")
    (unfinished / "images").mkdir(parents=True)
    (unfinished / "images/junk.jpg").write_text("half an image")
    found = contents(generate(tmp_path, TINY, "val"))
    assert "images/junk.jpg" not in found and not unfinished.exists()


def test_an_incomplete_split_is_generated_again(tmp_path: Path) -> None:
    folder = generate(tmp_path, TINY, "val")
    before = contents(folder)
    (folder / "annotations.json").unlink()
    (folder / "images/000001.jpg").unlink()
    assert contents(generate(tmp_path, TINY, "val")) == before


def test_a_file_system_without_locks_is_explained(tmp_path: Path, monkeypatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    with pytest.raises(
        files.NoLocksError, match=r"val\.lock cannot be locked \(No locks available\)"
    ):
        generate(tmp_path, TINY, "val")


LARGE = replace(SETS["large"], train=5000)  # images that do not fit into a pipe


def generate_large(folder: Path) -> None:
    cv2.setNumThreads(0)
    writing.MIN_IMAGES_FOR_WORKERS = 1
    generate(folder, LARGE, "train")


def is_running(process: Path) -> bool:
    """Returns whether a process of /proc runs; a container may not reap those that have ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    process = FORK.Process(target=generate_large, args=(tmp_path,))
    process.start()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.is_alive() and len(list(tmp_path.glob("**/*.tmp/images/*"))) < 4:
        time.sleep(0.05)
    workers = [Path("/proc", pid) for pid in children.read_text().split()]
    assert workers
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2)  # until the workers wait to send images to it
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(int(worker.name), signal.SIGKILL)
    assert not left


def generate_in_a_group(folder: Path) -> None:
    os.setsid()
    workers.SECONDS = 2.0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    generate_large(folder)


def test_a_signal_to_all_processes_leaves_no_files(tmp_path: Path) -> None:
    process = FORK.Process(target=generate_in_a_group, args=(tmp_path,))
    process.start()
    while process.is_alive() and len(list(tmp_path.glob("**/*.tmp/images/*"))) < 4:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 143 and not list(tmp_path.glob("**/*.tmp"))


def test_waiting_names_the_process_and_the_time(tmp_path: Path, monkeypatch, caplog) -> None:
    reports = FORK.Semaphore(0)

    def generate_after_three_reports() -> None:
        generate_slowly(
            tmp_path,
            FORK.Barrier(1),
            tmp_path / "log",
            lambda: [reports.acquire(timeout=60) for _ in range(3)],
        )

    monkeypatch.setattr(writing, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(writing, "REPORT_SECONDS", 0.2)
    process = FORK.Process(target=generate_after_three_reports)
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    log = logging.getLogger(writing.__name__)
    monkeypatch.setattr(log, "filters", [lambda record: reports.release() or True])
    with caplog.at_level(logging.WARNING):
        folder = generate(tmp_path, TINY, "train")
    process.join()
    waiting = [record.getMessage() for record in caplog.records]
    assert len(waiting) >= 3
    assert waiting[0].startswith(f"Waiting for process {process.pid} on ")
    assert re.search(f"which generates {folder}: [0-9]+ s so far", waiting[0])
    assert (tmp_path / "log").read_text() == "generated\n"


def generate_slowly(
    folder: Path,
    barrier: Barrier,
    log: Path,
    wait: Callable[[], object] = lambda: time.sleep(0.5),
) -> None:
    cv2.setNumThreads(0)
    write = writing._write

    def slow(*args: Any) -> None:
        with log.open("a") as file:
            file.write("generated\n")
        wait()
        write(*args)

    writing._write = slow
    barrier.wait()
    generate(folder, TINY, "train")


def test_several_processes_generate_it_once(tmp_path: Path) -> None:
    args = (tmp_path / "sets", FORK.Barrier(3), tmp_path / "log")
    processes = [FORK.Process(target=generate_slowly, args=args) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert args[2].read_text() == "generated\n"
    assert len(contents(split_folder(str(args[0]), "custom", TINY, "train"))) == 2 * 6 + 1
