# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Training runs that are killed with SIGKILL, resumed, and compared with a run without kills."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .progress import Progress

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/Shapes/faster_rcnn_slim_dconv3_droi.yaml"
# A checkpoint after each step, so that a random kill often meets one that is being written.
KEYS = {
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 10,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 5,
    "DATASETS.TRAIN": "('shapes_tiny_train',)",
    "DATASETS.TEST": "('shapes_tiny_test',)",
    "DATALOADER.NUM_WORKERS": 1,
}
DRAWN = "shapes_demo_val"  # 250 images: enough that they are drawn by worker processes
LEFT_SECONDS = 30  # until workers notice that their parent has ended
RUN_SECONDS = 300  # a resumed run that takes longer hangs


class Runs:
    """Runs of train_net.py in a folder, all with the same data sets and settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "datasets"
        self.seconds = 0.0  # that a run without kills takes
        self.started: list[int] = []  # process groups

    def start(
        self, output: Path, *flags: str, data: Path | None = None, **more: object
    ) -> subprocess.Popen[bytes]:
        """Starts a run; its messages are appended to `<output>.txt`."""
        keys = {**KEYS, **{k.replace("__", "."): v for k, v in more.items()}, "OUTPUT_DIR": output}
        words = [sys.executable, "train_net.py", "--config-file", CONFIG, *flags]
        words += [str(word) for pair in keys.items() for word in pair]
        variables = {"OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(data or self.data)}
        with output.with_suffix(".txt").open("ab") as messages:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ""},
                stdout=messages,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process.pid)
        return process

    def finish(self, output: Path, *flags: str, **more: object) -> str:
        """Runs to the end; returns what went wrong."""
        process = self.start(output, *flags, **more)
        try:
            code = process.wait(RUN_SECONDS)
        except subprocess.TimeoutExpired:
            kill_group(process)
            return f"it did not end within {RUN_SECONDS} s"
        lines = output.with_suffix(".txt").read_text(errors="replace").splitlines()
        return f"exit code {code}: {' | '.join(lines[-3:])}" if code else ""


def left_in(groups: list[int]) -> list[int]:
    """Returns the processes of these groups that do not end within LEFT_SECONDS."""
    deadline = time.monotonic() + LEFT_SECONDS
    while (found := running_in(groups)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def running_in(groups: list[int]) -> list[int]:
    """Returns the processes of these groups that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent group ...
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(group) in groups and state != "Z":
            found.append(int(path.parent.name))
    return found


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a run with its workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(progress: Progress, seed: int, folder: Path) -> None:
    """Kills and resumes runs until the time is over, each kind at least once.

    Args:
        progress: of the part.
        seed: of the moments of the kills.
        folder: to work in.
    """
    rng = random.Random(seed)
    runs = Runs(folder)
    if problem := runs.finish(folder / "first"):  # draws the data set, too
        progress.fail(f"a run without kills: {problem}")
        return
    begin = time.monotonic()
    for name, more in (("whole", {}), ("drawn", {"DATASETS__TRAIN": f"('{DRAWN}',)"})):
        if problem := runs.finish(folder / name, **more):
            progress.fail(f"a run without kills: {problem}")
            return
        runs.seconds = runs.seconds or time.monotonic() - begin
    compare(progress, folder / "first", folder / "whole", "two runs without kills")
    kinds = {
        "training": kill_training,
        "checkpoint": kill_at_checkpoint,
        "drawing": kill_drawing,
        "evaluation": kill_evaluation,
    }
    while not progress.is_over() or any(progress.counts[kind] == 0 for kind in kinds):
        for kind, kill in kinds.items():
            output = folder / "killed"
            kill(progress, runs, output, rng)
            progress.count(kind)
            if left := left_in(runs.started):
                names = [Path(f"/proc/{pid}/cmdline").read_bytes()[:100] for pid in left]
                progress.fail(f"{kind}: {len(left)} processes of killed runs still run: {names}")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            runs.started.clear()
            shutil.rmtree(output, ignore_errors=True)
            output.with_suffix(".txt").unlink()
            if progress.is_over() and all(progress.counts[kind] for kind in kinds):
                break


def kill_when(process: subprocess.Popen[bytes], happens: Callable[[], bool]) -> bool:
    """Kills a run as soon as something happens; returns False if it ended or hung before."""
    end = time.monotonic() + RUN_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if happens():
            break
        time.sleep(0.001)
    killed = process.poll() is None
    # The process alone: its workers have to notice.
    process.kill()
    process.wait()
    return killed


def after(seconds: float) -> Callable[[], bool]:
    """Returns a condition that becomes true after a time."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def kill_training(progress: Progress, runs: Runs, output: Path, rng: random.Random) -> None:
    """Kills a run up to three times at random moments, then lets it finish."""
    for flags in ((), ("--resume",), ("--resume",))[: rng.randint(1, 3)]:
        moment = after(rng.uniform(0, runs.seconds))
        killed = kill_when(runs.start(output, *flags), moment)
        progress.count("kills", int(killed))
    resume_and_compare(progress, runs, output, "killed in training")


def kill_at_checkpoint(progress: Progress, runs: Runs, output: Path, rng: random.Random) -> None:
    """Kills a run while it writes a checkpoint, or the name of the last one."""
    wanted, pause = rng.randint(1, 20), rng.uniform(0, 0.02)
    seen: set[tuple[str, int]] = set()

    def is_writing() -> bool:
        if output.is_dir():
            for entry in os.scandir(output):
                try:
                    if "model" in entry.name or "last_checkpoint" in entry.name:
                        seen.add((entry.name, entry.stat().st_size))
                except FileNotFoundError:  # it was renamed
                    seen.add((entry.name, -1))
        if len(seen) < wanted:
            return False
        time.sleep(pause)
        return True

    progress.count("kills", int(kill_when(runs.start(output), is_writing)))
    resume_and_compare(progress, runs, output, f"killed while {sorted(seen)[-1:]} was written")


def kill_evaluation(progress: Progress, runs: Runs, output: Path, rng: random.Random) -> None:
    """Kills a run in one of its evaluations."""
    wanted, pause = rng.randint(1, 2), rng.uniform(0, 0.5)

    def evaluates() -> bool:
        log = output / "log.txt"
        text = log.read_text(errors="replace") if log.exists() else ""
        if text.count("Start inference on") < wanted:
            return False
        time.sleep(pause)
        return True

    progress.count("kills", int(kill_when(runs.start(output), evaluates)))
    resume_and_compare(progress, runs, output, "killed in an evaluation")
    flags = ("--eval-only", "MODEL.WEIGHTS", str(output / "model_final.pth"))
    before = (output / "results.json").read_text()
    killed = kill_when(runs.start(output, *flags), after(rng.uniform(0, runs.seconds)))
    progress.count("kills", int(killed))
    if problem := runs.finish(output, *flags):
        progress.fail(f"--eval-only after one that was killed: {problem}")
    elif (output / "results.json").read_text() != before:
        progress.fail("--eval-only after one that was killed: other results")


def kill_drawing(progress: Progress, runs: Runs, output: Path, rng: random.Random) -> None:
    """Kills a run while it draws its data set."""
    data = runs.folder / "drawn_again"
    pause = rng.uniform(0, 1)

    def draws() -> bool:
        if not any(data.glob("shapes/*/val*/images")):
            return False
        time.sleep(pause)
        return True

    more = {"DATASETS__TRAIN": f"('{DRAWN}',)"}
    progress.count("kills", int(kill_when(runs.start(output, data=data, **more), draws)))
    if problem := runs.finish(output, "--resume", data=data, **more):
        progress.fail(f"killed while drawing: {problem}")
    else:
        compare(progress, runs.folder / "drawn", output, "killed while drawing")
        if digest(data) != digest(runs.data):
            progress.fail("killed while drawing: other images or annotations")
    shutil.rmtree(data)


def resume_and_compare(progress: Progress, runs: Runs, output: Path, what: str) -> None:
    """Resumes a run that was killed, and compares its final weights."""
    if problem := runs.finish(output, "--resume"):
        progress.fail(f"{what}, then resumed: {problem}")
    else:
        compare(progress, runs.folder / "whole", output, what)


def compare(progress: Progress, whole: Path, output: Path, what: str) -> None:
    """Compares the final weights of two runs bitwise."""
    expected, found = (
        torch.load(folder / "model_final.pth", weights_only=True)["model"]
        for folder in (whole, output)
    )
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    if wrong or found.keys() != expected.keys():
        progress.fail(f"{what}: other weights in {len(wrong)} tensors, such as {wrong[:3]}")
    progress.count("equal weights", int(not wrong))


def digest(root: Path) -> str:
    """Returns a hash of the drawn files in a folder of data sets, with their names."""
    files = sorted(path for path in root.glob("shapes/demo-*/val/**/*") if path.is_file())
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(str(path.relative_to(root)).encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()
