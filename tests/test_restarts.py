# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training by several processes, and training that was killed: the same weights as without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="train_net.py needs Detectron2")

from tests.tiny_coco import write_tiny_coco

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SLIM = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    # Norms that do not depend on which images share a process.
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "DATALOADER.NUM_WORKERS": 1,
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.STEPS": "()",
    "SEED": 1,
}


def command(data: Path, output: Path, *flags: str, start: tuple[str, ...] = (), **more: object):
    """Returns the command of a training."""
    config = "configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml"
    words = [sys.executable, *start, "train_net.py", "--config-file", config, *flags]
    words += ["--train-data", str(data), str(data.parent), "OUTPUT_DIR", str(output)]
    return words + [str(word) for pair in {**SLIM, **more}.items() for word in pair]


def run(*words: object, **more: object) -> str:
    done = subprocess.run(
        command(*words, **more),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(output: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(output / name, weights_only=True)["model"]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    data = write_tiny_coco(tmp_path / "data", images=4)
    steps = {"SOLVER.MAX_ITER": 5}
    run(data, tmp_path / "one", **steps)
    run(data, tmp_path / "two", start=TORCHRUN, **steps)
    run(data, tmp_path / "other", **steps, SEED=2)
    one, two, other = (weights(tmp_path / name) for name in ("one", "two", "other"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=name)
    # Five steps do move weights by more than that.
    assert max(float((other[name] - one[name]).abs().max()) for name in one) > 1e-3
    environment = (tmp_path / "two/environment.txt").read_text()
    assert "processes: 2" in environment and "revision: " in environment


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    data = write_tiny_coco(tmp_path / "data", images=4)
    steps = {"SOLVER.MAX_ITER": 16, "SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.STEPS": "(8,)"}
    run(data, tmp_path / "whole", **steps)
    output = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(data, output, **steps),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # its workers are killed with it
    ) as training:
        deadline = time.monotonic() + 120
        while not (output / "last_checkpoint").exists():
            assert training.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(training.pid, signal.SIGKILL)
    assert not (output / "model_final.pth").exists()
    run(data, output, "--resume", **steps)
    whole, resumed = weights(tmp_path / "whole"), weights(output)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    ("start", "flags", "message"),
    [
        ((), ["SOLVER.MAXITER", "5"], "nearest: SOLVER.MAX_ITER"),
        ((), ["--num-gpus", "2"], "--num-gpus must be at most 1 with 0 GPUs to use, got 2"),
        (TORCHRUN, ["SOLVER.IMS_PER_BATCH", "3"], "multiple of the 2 processes, got 3"),
    ],
)
def test_what_cannot_work_stops_with_one_line(start, flags, message, tmp_path: Path) -> None:
    data = write_tiny_coco(tmp_path / "data", images=1)
    options = flags if flags[0].startswith("--") else []
    words = command(data, tmp_path / "output", *options, start=start)
    words += [word for word in flags if word not in options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "output").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_net: ")]
    assert len(lines) == 1 and message in lines[0]
    if not start:
        assert "Traceback" not in done.stderr
