# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Each part of `make soak` for a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="the models need Detectron2")
pytest.importorskip("cv2", reason="Shapes is drawn with OpenCV")

from tests.soak import __main__ as soak
from tests.soak import kills, large, models, ops, progress
from tests.soak.progress import Progress


def test_ops_are_called_and_compared(restore_threads: None) -> None:
    done = Progress("ops", 1.0, bounded=False)
    ops.run(done, seed=1)
    assert not done.failures
    assert done.counts["deform_conv2d"] > 0 and done.counts["compared"] > 0


def test_results_that_depend_on_threads_fail(monkeypatch, restore_threads: None, capsys) -> None:
    def call(number: int) -> tuple[str, str]:
        time.sleep(0.001 * (9 - number))  # call 1 ends last
        return "op", str(torch.get_num_threads())

    monkeypatch.setattr(ops, "call", call)
    torch.set_num_threads(2)
    done = Progress("ops", 0.0, bounded=False)
    ops.run(done, seed=1)
    assert done.failures and "its results depend on the threads" in done.failures[0]
    assert "FAILED: ops: call 1: " in capsys.readouterr().out


def test_models_run_on_random_sizes(monkeypatch) -> None:
    monkeypatch.setattr(models, "SIZES", (16, 64))
    done = Progress("models", 0.0, bounded=False)
    models.run(done, seed=1)
    assert not done.failures and done.counts == dict.fromkeys(models.MODELS, 1)


def test_gradients_that_are_not_finite_fail(monkeypatch, capsys) -> None:
    monkeypatch.setattr(models, "SIZES", (16, 64))
    monkeypatch.setattr(models, "MODELS", ("deeplab_dconv3",))
    build = models.build_slim_model

    def broken(name: str) -> torch.nn.Module:
        model = build(name)
        torch.nn.init.constant_(next(model.parameters()), float("nan"))
        return model

    monkeypatch.setattr(models, "build_slim_model", broken)
    done = Progress("models", 0.0)
    models.run(done, seed=1)
    assert len(done.failures) == 1 and "not finite" in done.failures[0]


def test_growing_memory_fails(monkeypatch, capsys) -> None:
    memory = iter([1000, 1100, 1100 + progress.MAX_GROWTH + 1])
    monkeypatch.setattr(progress, "resident", lambda: next(memory) * progress.MIB)
    now = 0.0
    monkeypatch.setattr(Progress, "elapsed", lambda done: now)
    done = Progress("ops", 0.3)
    assert not done.is_over()  # while it warms up
    assert not done.is_over()
    now = 0.3
    assert done.is_over()
    done.finish()
    assert done.failures == [
        f"resident memory grew by {progress.MAX_GROWTH + 1} MiB, more than 400"
    ]


def test_large_gradients_agree_at_both_ends(monkeypatch) -> None:
    # The same with 4e5 elements.
    monkeypatch.setattr(large, "SIDE", 230)
    monkeypatch.setattr(large, "STEP", 107)
    monkeypatch.setattr(large, "NEEDED", 0)
    done = Progress("large", 0.0)
    large.run(done, seed=1)
    assert not done.failures and done.counts == {"deform_conv2d": 1, "deform_roi_pool": 1}


def test_large_gradients_are_skipped_without_memory(monkeypatch, capsys) -> None:
    monkeypatch.setattr(large, "NEEDED", 2**60)
    done = Progress("large", 0.0)
    large.run(done, seed=1)
    assert done.counts == {"skipped": 2} and "GiB of memory are needed" in capsys.readouterr().out


def test_a_process_is_killed_when_something_happens() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    begin = time.monotonic()
    assert kills.kill_when(process, kills.after(0.1))
    assert 0.1 <= time.monotonic() - begin < 30
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not kills.kill_when(process, lambda: True)


def test_processes_that_are_left_are_found() -> None:
    code = "import os, time; os.fork(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        while len(kills.running_in([process.pid])) < 2:
            time.sleep(0.01)
        process.kill()
        process.wait()
        (left,) = kills.running_in([process.pid])
        assert left != process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    while kills.running_in([process.pid]):
        time.sleep(0.01)


def test_other_weights_fail(tmp_path: Path, capsys) -> None:
    for name, value in (("whole", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        torch.save({"model": {"weight": torch.tensor(value)}}, tmp_path / name / "model_final.pth")
    done = Progress("kills", 0.0)
    kills.compare(done, tmp_path / "whole", tmp_path / "whole", "killed")
    assert not done.failures
    kills.compare(done, tmp_path / "whole", tmp_path / "other", "killed")
    assert done.failures == ["killed: other weights in 1 tensors, such as ['weight']"]


def test_the_exit_code_tells_of_failures(monkeypatch, capsys) -> None:
    monkeypatch.setattr(large, "run", lambda progress, seed: progress.fail("too large"))
    assert soak.main(["--part", "large"]) == 1
    monkeypatch.setattr(large, "run", lambda progress, seed: None)
    assert soak.main(["--part", "large"]) == 0


@pytest.mark.slow
def test_each_kind_of_kill(tmp_path: Path) -> None:
    done = Progress("kills", 0.0, bounded=False)
    kills.run(done, 1, tmp_path)
    assert not done.failures and done.counts["kills"] >= 3
