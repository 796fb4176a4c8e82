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
from tests.tiny_voc import write_tiny_cityscapes

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SLIM = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    # Norms that do not depend on which images share a process.
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.RESNETS.REDUCED_CHANNELS": 32,
    "MODEL.RPN.CONV_DIMS": "[32]",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.OHEM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[24, 48]]",
    "DATALOADER.NUM_WORKERS": 1,
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "INPUT.MIN_SIZE_TRAIN": "(96,)",
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.STEPS": "()",
    "SEED": 1,
}
NETWORKS = (
    "VOC-Detection/faster_rcnn_R_101_dconv3_droi_joint",
    "VOC-Detection/rfcn_R_101_dconv3_droi_joint",
    "VOC-Detection/ca_rpn_R_101_dconv3",
    "Cityscapes-Segmentation/deeplab_R_101_dconv3",
)


def command(
    root: Path, output: Path, *flags: str, start: tuple[str, ...] = (), **more: object
) -> list[str]:
    """Returns the command of a training; more: `config`, and keys with __ for dots."""
    config = more.pop("config", NETWORKS[0])
    words = [sys.executable, *start, "train_net.py", "--config-file", f"configs/{config}.yaml"]
    if "Cityscapes" not in config:
        words += ["--train-data", str(root / "own/annotations.json"), str(root / "own")]
    keys = {**SLIM, **{key.replace("__", "."): value for key, value in more.items()}}
    words += [*flags, "DATASETS.TEST", "()", "OUTPUT_DIR", str(output)]
    return words + [str(word) for pair in keys.items() for word in pair]


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(root)}


def run(root: Path, output: Path, *flags: str, **more: object) -> str:
    done = subprocess.run(
        command(root, output, *flags, **more),
        cwd=ROOT,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(output: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(output / name, weights_only=True)["model"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of one's own, and Cityscapes."""
    folder = tmp_path_factory.mktemp("datasets")
    write_tiny_coco(folder / "own", images=4)
    write_tiny_cityscapes(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", NETWORKS)
@pytest.mark.parametrize(
    ("steps", "rate", "tolerance"),
    # After one step rounding alone differs; it grows from step to step, the faster the more they
    # change.
    [(1, 0.01, 1e-6), (5, 0.0005, 1e-5)],
    ids=["one step", "five steps"],
)
def test_two_processes_learn_what_one_does(
    config: str, steps: int, rate: float, tolerance: float, root: Path, tmp_path: Path
) -> None:
    how = {"SOLVER__MAX_ITER": steps, "SOLVER__BASE_LR": rate, "SOLVER__WARMUP_ITERS": 0}
    run(root, tmp_path / "one", config=config, **how)
    run(root, tmp_path / "two", config=config, start=TORCHRUN, **how)
    run(root, tmp_path / "start", config=config, **{**how, "SOLVER__BASE_LR": 0.0})
    one, two, before = (weights(tmp_path / name) for name in ("one", "two", "start"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=tolerance, msg=name)
    # They did learn, by much more than the tolerance.
    assert max(float((before[name] - one[name]).abs().max()) for name in one) > 30 * tolerance
    described = (tmp_path / "two/environment.txt").read_text()
    assert "processes: 2" in described and "revision: " in described


@pytest.mark.slow
def test_processes_that_do_not_share_their_folder_do_not_resume(root: Path, tmp_path: Path) -> None:
    # As on two machines: each process names a folder of its own.
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, sys, runpy\n"
        "sys.argv = [word.replace('RANK', os.environ['RANK']) for word in sys.argv[1:]]\n"
        "sys.path.insert(0, os.getcwd())\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    start = (*TORCHRUN, str(script))
    more = {"SOLVER__MAX_ITER": 3, "start": start}
    run(root, tmp_path / "output_RANK", **more)
    words = command(root, tmp_path / "output_RANK", "--resume", **more)
    done = subprocess.run(
        words, cwd=ROOT, env=environment(root), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "train_net: OUTPUT_DIR must be one folder that all machines share" in done.stderr


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_been(root: Path, tmp_path: Path) -> None:
    steps = {"SOLVER__MAX_ITER": 16, "SOLVER__CHECKPOINT_PERIOD": 3, "SOLVER__STEPS": "(8,)"}
    run(root, tmp_path / "whole", **steps)
    output = tmp_path / "killed"
    with subprocess.Popen(
        command(root, output, **steps),
        cwd=ROOT,
        env=environment(root),
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
    run(root, output, "--resume", **steps)
    whole, resumed = weights(tmp_path / "whole"), weights(output)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    ("start", "flags", "more", "message"),
    [
        ((), [], {"SOLVER__MAXITER": 5}, "nearest: SOLVER.MAX_ITER"),
        ((), ["--num-gpus", "2"], {}, "--num-gpus must be at most 1 with 0 GPUs to use, got 2"),
        (TORCHRUN, [], {"SOLVER__IMS_PER_BATCH": 3}, "multiple of the 2 processes, got 3"),
    ],
)
def test_what_cannot_work_stops_with_one_line(
    start, flags, more, message, root: Path, tmp_path: Path
) -> None:
    words = command(root, tmp_path / "output", *flags, start=start, **more)
    done = subprocess.run(
        words, cwd=ROOT, env=environment(root), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not (tmp_path / "output").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_net: ")]
    assert len(lines) == 1 and message in lines[0]
    if not start:
        assert "Traceback" not in done.stderr
