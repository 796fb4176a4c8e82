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

import demo
import matplotlib.image
import pytest
import torch

from detectron2.modeling import build_model

from dcn_plugin.engine import read_config

pytestmark = pytest.mark.usefixtures("shapes_root")

TINY = {
    "DATASETS.TRAIN": "('shapes_tiny_train',)",
    "DATASETS.TEST": "('shapes_tiny_test',)",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.IMS_PER_BATCH": "2",
}
WORDS = [word for pair in TINY.items() for word in pair]


def test_the_demo_trains_evaluates_and_draws(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "MIN_SCORE", 0.0)  # scores are low after two iterations
    demo.main(["--output", str(tmp_path), *WORDS])
    printed = capsys.readouterr().out
    assert "| AP | AP50 | AP70 | AP75 | data, s |" in printed
    (line,) = [line for line in printed.splitlines() if "tools/visualize.py" in line]
    assert f"--weights {tmp_path / 'model_final.pth'} --input shapes_tiny_test" in line
    assert line.endswith(shlex.join(WORDS))
    for name in ("detections.png", "sampling.png", "results.json"):
        assert str(tmp_path / name) in printed and (tmp_path / name).is_file()
    for name in ("detections.png", "sampling.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[1] > 2 * picture.shape[0] and picture.std() > 0.05


def test_a_second_run_starts_anew_and_may_have_no_detections(tmp_path, monkeypatch, capsys) -> None:
    def train(command: list[str], folder: Path, output: object, tell: object) -> None:
        assert not (folder / "metrics.json").exists() and not (folder / "results.json").exists()
        cfg = read_config(demo.parse_arguments(command[2:]))
        torch.save(build_model(cfg).state_dict(), folder / "model_final.pth")
        metrics = dict.fromkeys(("AP", "AP50", "AP70", "AP75"), 0.0)
        (folder / "results.json").write_text(json.dumps({"bbox": metrics}))

    monkeypatch.setattr(demo, "watch", train)
    for name in ("metrics.json", "results.json", "detections.png", "sampling.png"):
        (tmp_path / name).write_text("of an earlier run")
    plain = "configs/Shapes/ca_rpn_slim_plain_demo.yaml"
    demo.main(["--config-file", plain, "--output", str(tmp_path), *WORDS])
    printed = capsys.readouterr().out
    assert "no pictures: there were no detections with a score above 0.5" in printed
    assert "visualize.py" not in printed
    assert not list(tmp_path.glob("*.png"))


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


def test_a_failed_training_run_names_its_log(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "watch", lambda *_: "exit 1: loss is NaN")
    with pytest.raises(SystemExit, match=r"demo: training failed, exit 1.* NaN; see .*stdout.txt"):
        demo.main(["--output", str(tmp_path), *WORDS])


def training_processes(folder: Path) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            text = path.read_text(errors="replace")
            if "train_net.py" in text and str(folder) in text:
                found.append(path)
    return found


def test_termination_ends_the_training_process(tmp_path: Path) -> None:
    words = [*WORDS, "SOLVER.MAX_ITER", "100000"]
    program = Path(demo.__file__)
    with subprocess.Popen(
        [sys.executable, str(program), "--output", str(tmp_path), *words], stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not training_processes(tmp_path):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1 and b"demo: terminated" in process.stderr.read()
    assert not training_processes(tmp_path)


@pytest.mark.slow
def test_the_demo_reaches_its_metrics(tmp_path: Path) -> None:
    demo.main(["--output", str(tmp_path / "demo")])
    metrics = json.loads((tmp_path / "demo/results.json").read_text())["bbox"]
    assert metrics["AP50"] >= 75 and metrics["AP70"] >= 60
    assert (tmp_path / "demo/detections.png").is_file()
    assert (tmp_path / "demo/sampling.png").is_file()
