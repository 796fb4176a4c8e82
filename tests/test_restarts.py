# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training in several processes, and runs that are killed and resumed."""

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

from dcn_plugin.compat import LAUNCHES_ON_CPU
from dcn_plugin.engine.checkpoint_files import iteration_in_name
from tests.tiny_coco import write_tiny_coco
from tests.tiny_voc import write_tiny_cityscapes

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SLIM = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
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
FASTER_RCNN = "VOC-Detection/faster_rcnn_R_101_dconv3_droi_joint"
RFCN = "VOC-Detection/rfcn_R_101_dconv3_droi_joint"
DEEPLAB = "Cityscapes-Segmentation/deeplab_R_101_dconv3"


def command(
    root: Path, output: Path, *flags: str, start: tuple[str, ...] = (), **more: object
) -> list[str]:
    """Returns the command of a run; more: `config`, and keys with __ for dots."""
    config = more.pop("config", FASTER_RCNN)
    words = [sys.executable, *start, "train_net.py", "--config-file", f"configs/{config}.yaml"]
    if "Cityscapes" not in config:
        words += ["--train-data", str(root / "custom/annotations.json"), str(root / "custom")]
    keys = {**SLIM, **{key.replace("__", "."): value for key, value in more.items()}}
    words += [*flags, "DATASETS.TEST", "()", "OUTPUT_DIR", str(output)]
    return words + [str(word) for pair in keys.items() for word in pair]


def environment(root: Path) -> dict[str, str]:
    # Without GPUs: torchrun's processes join by Gloo.
    more = {"OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(root), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **more}


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


def assert_equal_weights(*folders: Path) -> None:
    """Compares the final weights of two runs bitwise."""
    whole, resumed = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"] for folder in folders
    )
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A custom data set, one whose evaluation takes long, and Cityscapes."""
    folder = tmp_path_factory.mktemp("datasets")
    write_tiny_coco(folder / "custom", images=4)
    write_tiny_coco(folder / "long", images=300)
    write_tiny_cityscapes(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", [RFCN, DEEPLAB])
def test_two_processes_resume_to_equal_weights(config: str, root: Path, tmp_path: Path) -> None:
    steps = {"SOLVER__MAX_ITER": 4, "SOLVER__STEPS": "(3,)", "SOLVER__CHECKPOINT_PERIOD": 2}
    run(root, tmp_path / "whole", config=config, start=TORCHRUN, **steps)
    output = tmp_path / "resumed"
    run(root, output, config=config, start=TORCHRUN, **{**steps, "SOLVER__MAX_ITER": 2})
    run(root, output, "--resume", config=config, start=TORCHRUN, **steps)
    assert_equal_weights(tmp_path / "whole", output)
    assert "World size: 2" in (output / "log.txt").read_text()


@pytest.mark.slow
def test_processes_with_different_checkpoints_do_not_resume(root: Path, tmp_path: Path) -> None:
    # As on two machines: each process names another folder.
    script = tmp_path / "rank_in_arguments.py"
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


def interrupt(
    root: Path,
    output: Path,
    number: int,
    *flags: str,
    group: bool = False,
    after: str = "Saving checkpoint",
    **more: object,
) -> tuple[int, str]:
    """Sends a signal to a run once its log has some text; returns its exit code and output."""
    with subprocess.Popen(
        command(root, output, *flags, **more),
        cwd=ROOT,
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as training:
        deadline = time.monotonic() + 120
        log = output / "log.txt"
        while not (log.exists() and after in log.read_text()):
            assert training.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        start = time.monotonic()
        if group:  # with its workers
            os.killpg(training.pid, number)
        else:
            training.send_signal(number)
        printed, _ = training.communicate(timeout=60)
        assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):  # no process is left
        for _ in range(600):
            os.killpg(training.pid, 0)
            time.sleep(0.1)
    return training.returncode, printed


STEPS = {"SOLVER__MAX_ITER": 16, "SOLVER__CHECKPOINT_PERIOD": 3, "SOLVER__STEPS": "(8,)"}


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run(root, folder, **STEPS)
    return folder


@pytest.mark.slow
def test_a_killed_run_resumes_to_equal_weights(root: Path, whole: Path, tmp_path: Path) -> None:
    # Early enough in the second checkpoint for the first to be whole.
    interrupt(root, tmp_path, signal.SIGKILL, group=True, after="model_0000005", **STEPS)
    assert not (tmp_path / "model_final.pth").exists()
    run(root, tmp_path, "--resume", **STEPS)
    assert_equal_weights(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_a_terminated_run_resumes_to_equal_weights(group, root, whole, tmp_path) -> None:
    code, printed = interrupt(root, tmp_path, signal.SIGTERM, group=group, **STEPS)
    assert code == 143 and "Traceback" not in printed
    last = (tmp_path / "last_checkpoint").read_text()
    iteration = iteration_in_name(last)
    assert iteration is not None and f"after iteration {iteration}: {tmp_path}/{last}" in printed
    run(root, tmp_path, "--resume", **STEPS)
    assert_equal_weights(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["Inference done", "Environment info"])
def test_a_signal_does_not_wait_for_evaluation_or_setup(after, root, tmp_path) -> None:
    flags = ("--test-data", str(root / "long/annotations.json"), str(root / "long"))
    keys = {
        "TEST__EVAL_PERIOD": 2,
        "DATASETS__TEST": "('custom_test',)",
        "INPUT__MIN_SIZE_TEST": 96,
    }
    script = tmp_path / "record_codes.py"
    script.write_text(RECORD_CODES)
    output = tmp_path / "output"
    start = (*TORCHRUN, str(script))
    interrupt(
        root, output, signal.SIGTERM, *flags, group=True, after=after, start=start, **keys, **STEPS
    )
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["143", "143"]
    checkpoints = {path.name for path in output.glob("*.pth")}
    assert checkpoints == ({"model_0000001.pth"} if after == "Inference done" else set())


# Runs train_net.py, and writes the exit code of each process of torchrun to a file.
RECORD_CODES = """
import os, sys, runpy
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
code = 0
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    code = error.code
    raise
finally:
    open(os.path.join(os.path.dirname(__file__), "code" + os.environ["RANK"]), "w").write(str(code))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
@pytest.mark.parametrize("group", [False, True])
def test_two_terminated_processes_resume_to_equal_weights(
    launcher, group, root: Path, tmp_path: Path
) -> None:
    if launcher == "launch" and not LAUNCHES_ON_CPU:
        pytest.skip("launch of Detectron2 0.6 starts several processes on GPUs only")
    script = tmp_path / "record_codes.py"
    script.write_text(RECORD_CODES)
    flags, more = ("--num-gpus", "2"), STEPS
    if launcher == "torchrun":
        flags, more = (), {**STEPS, "start": (*TORCHRUN, str(script))}
    run(root, tmp_path / "whole", *flags, **more)
    output = tmp_path / "output"
    code, printed = interrupt(root, output, signal.SIGTERM, *flags, group=group, **more)
    if launcher == "torchrun":
        assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == ["143", "143"]
    else:
        assert code == 143 and "Traceback" not in printed
    assert not (output / "model_final.pth").exists() and "Stopped by SIGTERM after" in printed
    run(root, output, "--resume", *flags, **more)
    assert_equal_weights(tmp_path / "whole", output)


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        ((), {"SOLVER__MAXITER": 5}, "nearest: SOLVER.MAX_ITER"),
        (TORCHRUN, {"MODEL__WEIGHTS": "none.pth"}, "MODEL.WEIGHTS must be a file"),
    ],
)
def test_errors_are_one_line_also_with_several_processes(
    start, more, message, root: Path, tmp_path: Path
) -> None:
    words = command(root, tmp_path / "output", start=start, **more)
    done = subprocess.run(
        words, cwd=ROOT, env=environment(root), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and not (tmp_path / "output").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_net: ")]
    assert len(lines) == 1 and message in lines[0]
    if not start:
        assert "Traceback" not in done.stderr
