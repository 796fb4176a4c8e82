# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The demo on a few images and iterations."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import pytest

pytest.importorskip("detectron2", reason="the demo trains with Detectron2")

import demo

pytestmark = pytest.mark.usefixtures("shapes_root")

TINY = {
    "DATASETS.TRAIN": "('shapes_tiny_train',)",
    "DATASETS.TEST": "('shapes_tiny_test',)",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.IMS_PER_BATCH": "2",
}
WORDS = [word for pair in TINY.items() for word in pair]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_trains_evaluates_and_draws(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "MIN_SCORE", 0.0)  # scores are low after two iterations
    demo.main(["--output", str(folder), *WORDS])
    printed = capsys.readouterr().out
    assert "| AP | AP50 | AP70 | AP75 | data, s |" in printed
    assert "ca_rpn_slim_plain_demo.yaml --output output/" in printed
    (line,) = [line for line in printed.splitlines() if "tools/visualize.py" in line]
    assert "--input shapes_tiny_test" in line and line.endswith(shlex.join(WORDS))
    for name in ("detections.png", "sampling.png", "results.json"):
        assert str(folder / name) in printed and (folder / name).is_file()
    for name in ("detections.png", "sampling.png"):
        picture = matplotlib.image.imread(folder / name)
        assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 0.05


def test_a_second_run_starts_anew_and_may_have_no_detections(folder: Path, capsys) -> None:
    (folder / "metrics.json").write_text('{"iteration": 900}\n')
    plain = "configs/Shapes/ca_rpn_slim_plain_demo.yaml"
    demo.main(["--config-file", plain, "--output", str(folder), *WORDS])
    printed = capsys.readouterr().out
    assert "no pictures: there were no detections with a score above 0.5" in printed
    assert "ca_rpn_slim_dconv3_demo.yaml --output" in printed and "visualize.py" not in printed
    lines = (folder / "metrics.json").read_text().splitlines()
    assert lines and all(json.loads(line)["iteration"] <= 2 for line in lines)
    assert not list(folder.glob("*.png"))  # of the model before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "configs/Shapes/ca_rpn.yaml"], r"demo: .*ca_rpn\.yaml' does not exist"),
        (["SOLVER.MAX_ITTER", "3"], r"demo: .*SOLVER.MAX_ITTER; the nearest: SOLVER.MAX_I"),
        (
            ["--config-file", "configs/Shapes/deeplab_slim_plain.yaml"],
            r"demo: .* COCO's format, got shapes_hard_test_sem_seg",
        ),
        (["DATASETS.TEST", "()"], r"demo: DATASETS.TEST must be one data set, got \(\)"),
        (["MODEL.LOAD_PROPOSALS", "True"], r"demo: .*PROPOSAL"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        demo.main(["--output", str(tmp_path / "none"), *words])
    assert not (tmp_path / "none").exists()


def test_a_failed_training_run_names_its_log(tmp_path: Path) -> None:
    words = [*WORDS, "SOLVER.BASE_LR", "1e30"]
    with pytest.raises(SystemExit, match=r"demo: training failed, .*; see .*stdout.txt"):
        demo.main(["--output", str(tmp_path), *words])


def test_termination_ends_the_training_process(tmp_path: Path) -> None:
    words = [*WORDS, "SOLVER.MAX_ITER", "100000"]
    program = Path(demo.__file__)
    with subprocess.Popen(
        [sys.executable, str(program), "--output", str(tmp_path), *words], stderr=subprocess.PIPE
    ) as process:
        log = tmp_path / "log.txt"  # of the training process
        while process.poll() is None and not log.is_file():
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1 and b"demo: terminated" in process.stderr.read()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            assert str(tmp_path) not in path.read_text(errors="replace")


@pytest.mark.slow
def test_the_demo_reaches_its_metrics(tmp_path: Path) -> None:
    demo.main(["--output", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo/results.json").read_text())["bbox"]
    assert metrics["AP50"] >= 75 and metrics["AP70"] >= 60
    assert (tmp_path / "demo/detections.png").is_file()
    assert (tmp_path / "demo/sampling.png").is_file()
