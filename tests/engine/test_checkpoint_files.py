# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checkpoints survive kills, full disks and damaged files, and never hold NaN."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer

from dcn_plugin.engine import Checkpointer, UserError
from dcn_plugin.engine.checkpoint_files import CheckpointWriteError, remove_unfinished

ROOT = Path(__file__).resolve().parents[2]


class State:
    """Stands for a trainer."""

    def __init__(self) -> None:
        self.iteration = -1

    def state_dict(self) -> dict[str, int]:
        return {"iteration": self.iteration}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.iteration = state["iteration"]


def checkpointer(folder: Path, kind: type[DetectionCheckpointer] = Checkpointer):
    return kind(nn.Linear(30, 40), str(folder), trainer=State())


def save(folder: Path, *iterations: int, final: bool = False) -> Checkpointer:
    """Saves checkpoints whose weights are all equal to their iteration."""
    saving = checkpointer(folder)
    periodic = PeriodicCheckpointer(saving, 1, iterations[-1] + 1 if final else None)
    for iteration in iterations:
        saving.checkpointables["trainer"].iteration = iteration
        for parameter in saving.model.parameters():
            nn.init.constant_(parameter, iteration)
        periodic.step(iteration)
    return saving


def resume(folder: Path) -> tuple[int, float]:
    """Resumes, and returns the iteration and the value of the weights."""
    resumed = checkpointer(folder)
    resumed.resume_or_load("", resume=True)
    (value,) = {value for p in resumed.model.parameters() for value in p.unique().tolist()}
    return resumed.checkpointables["trainer"].iteration, value


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saves_what_detectron2_saves(tmp_path) -> None:
    ours, theirs = checkpointer(tmp_path / "a"), checkpointer(tmp_path / "b", DetectionCheckpointer)
    for each in (ours, theirs):
        Path(each.save_dir).mkdir()
        nn.init.ones_(each.model.weight)
        nn.init.ones_(each.model.bias)
        each.save("model_0000001", iteration=1)
    assert content(tmp_path / "a").keys() == content(tmp_path / "b").keys()
    a, b = (torch.load(tmp_path / f / "model_0000001.pth", weights_only=True) for f in "ab")
    assert a.keys() == b.keys() and a["trainer"] == b["trainer"]
    assert torch.equal(a["model"]["weight"], b["model"]["weight"])


def test_a_kill_while_a_checkpoint_is_rewritten_leaves_the_old_one(tmp_path) -> None:
    # Seen before: model_final.pth with no bytes, the only name in last_checkpoint.
    save(tmp_path, 3, final=True)
    (tmp_path / "model_0000003.pth").unlink()
    before = content(tmp_path)
    script = (
        "import os, signal, sys, torch\n"
        "from tests.engine.test_checkpoint_files import checkpointer\n"
        "class Killed:\n"
        "    def __reduce__(self):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpointer(sys.argv[1]).save('model_final', last=[torch.zeros(100000), Killed()])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    after = content(tmp_path)
    (left,) = after.keys() - before.keys()
    assert left.startswith("model_final.pth.") and left.endswith(".tmp")
    assert resume(tmp_path) == (3, 3)
    (tmp_path / "notes.tmp").touch()  # of the user
    remove_unfinished(tmp_path)
    assert content(tmp_path) == {**before, "notes.tmp": b""}


@pytest.fixture
def files_are_limited() -> Iterator[None]:
    """Limits the size of files, as a full disk does, in the middle of the second tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_a_file_that_is_too_large_is_one_line(tmp_path, request) -> None:
    saving = save(tmp_path, 3)
    before = content(tmp_path)
    request.getfixturevalue("files_are_limited")
    with pytest.raises(CheckpointWriteError) as caught:
        saving.save("model_0000003", iteration=4)
    message = str(caught.value)
    size = len(before["model_0000003.pth"])
    assert message.startswith(f"{tmp_path}/model_0000003.pth cannot be written, File too large")
    assert f"it needs {size:,} bytes" in message and "\n" not in message
    assert content(tmp_path) == before


@pytest.mark.parametrize("where", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint(where, code, tmp_path, monkeypatch) -> None:
    saving = save(tmp_path, 3)
    before = content(tmp_path)
    refuse = OSError(code, os.strerror(code))

    def fail(*arguments: object) -> None:
        raise refuse

    if where == "fsync":  # as network file systems do
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(torch, "save", lambda data, file: write_or_count(file, fail))
    with pytest.raises(CheckpointWriteError, match=f"0000004.pth cannot be .* {refuse.strerror}"):
        saving.save("model_0000004")
    assert content(tmp_path) == before


def write_or_count(file, fail) -> None:
    fail() if hasattr(file, "name") else file.write(b"1234")


def flip(path: Path, position: int) -> None:
    """Flips the bits of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 255
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_by(value: object):
    return lambda path: torch.save(value, path)


DAMAGE = {
    "missing": (Path.unlink, "it does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "truncated": (truncate, "its end is missing"),
    "corrupt": (
        lambda path: flip(path, path.read_bytes().index(torch.ones(9).numpy().tobytes())),
        "the checksum of its part",
    ),
    "text": (lambda path: path.write_text("no checkpoint"), "must be a checkpoint"),
    "a list": (replace_by([1, 2]), "it has no weights"),
    "weights only": (replace_by({"weight": torch.ones(40, 30)}), "it has no state of the trainer"),
    "not finite": (
        replace_by({"model": {"weight": torch.full((40, 30), torch.nan)}, "trainer": {}}),
        "1 of its tensors are not finite, weight",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "it is not a regular file"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "it is not a regular file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_intact_checkpoint_is_used(kind, tmp_path, caplog) -> None:
    damage, message = DAMAGE[kind]
    save(tmp_path, 0, 9, 1)
    (tmp_path / "model_0000009.pth").rename(tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    damage(tmp_path / "model_0000001.pth")
    assert resume(tmp_path) == (0, 0)
    (line,) = [r.getMessage() for r in caplog.records if "cannot be resumed" in r.getMessage()]
    assert line.startswith(f"{tmp_path}/model_0000001.pth cannot be resumed from: ")
    assert message in line and "\n" not in line
    assert "iterations than model_0000000.pth" in caplog.text and "model_0000003.pth" in caplog.text


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_intact_checkpoint_is_an_error(kind, tmp_path) -> None:
    damage, message = DAMAGE[kind]
    save(tmp_path, 1)
    damage(tmp_path / "model_0000001.pth")
    with pytest.raises(
        ValueError, match=r"no intact checkpoint to resume from: .*0000001"
    ) as caught:
        resume(tmp_path)
    assert message in str(caught.value)


def test_any_flipped_byte_is_found_or_harmless(tmp_path) -> None:
    save(tmp_path, 0, 1)
    path = tmp_path / "model_0000001.pth"
    whole = path.read_bytes()
    found = 0
    for position in range(0, len(whole), 61):
        path.write_bytes(whole)
        flip(path, position)
        resumed = resume(tmp_path)
        assert resumed in [(0, 0), (1, 1)]
        found += resumed == (0, 0)
    assert found > 50


def test_an_older_format_is_resumed_too(tmp_path) -> None:
    saving = save(tmp_path, 5)
    path = tmp_path / "model_0000005.pth"
    data = {"model": saving.model.state_dict(), "trainer": {"iteration": 5}}
    torch.save(data, path, _use_new_zipfile_serialization=False)
    assert resume(tmp_path) == (5, 5)
    truncate(path)
    with pytest.raises(ValueError, match="no intact checkpoint"):
        resume(tmp_path)


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_text("")])
def test_checkpoints_are_used_without_last_checkpoint(lost, tmp_path, caplog) -> None:
    save(tmp_path, 2, 10, final=True)
    lost(tmp_path / "last_checkpoint")
    assert resume(tmp_path) == (10, 10)
    assert "last_checkpoint is missing or empty" in caplog.text
    for name in ("model_final.pth", "model_0000010.pth"):
        (tmp_path / name).write_bytes(b"")
    assert resume(tmp_path) == (2, 2)


def test_the_best_checkpoint_is_used_if_there_is_no_other(tmp_path) -> None:
    save(tmp_path, 2, 4)
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_0000002.pth").rename(tmp_path / "model_best.pth")
    assert resume(tmp_path) == (4, 4)
    (tmp_path / "model_0000004.pth").unlink()
    assert resume(tmp_path) == (2, 2)


def test_the_final_checkpoint_is_ordered_by_its_iteration(tmp_path) -> None:
    save(tmp_path, 2, 4, final=True)  # of a run that has been extended
    save(tmp_path, 6)
    (tmp_path / "model_0000004.pth").unlink()
    (tmp_path / "model_0000006.pth").write_bytes(b"")
    assert resume(tmp_path) == (4, 4)


def test_a_state_that_has_been_added_starts_anew(tmp_path, caplog) -> None:
    save(tmp_path, 3)
    model, trainer, average = nn.Linear(30, 40), State(), State()
    resumed = Checkpointer(model, str(tmp_path), trainer=trainer, average=average)
    resumed.resume_or_load("", resume=True)
    assert (trainer.iteration, average.iteration, model.weight[0, 0].item()) == (3, -1, 3)
    assert "0000003.pth has no state of the average, which starts anew" in caplog.text
    other = Checkpointer(model, str(tmp_path), average=average, other=State())
    with pytest.raises(ValueError, match="it has no state of the average or the other"):
        other.resume_or_load("", resume=True)


def test_a_name_of_another_folder_matters_only_for_resuming(tmp_path) -> None:
    (tmp_path / "last_checkpoint").write_text("/elsewhere/model_final.pth")
    resumed = checkpointer(tmp_path)
    assert resumed.has_checkpoint()
    assert resumed.resume_or_load("", resume=False) == {}
    with pytest.raises(ValueError, match="last_checkpoint must name a file of its folder"):
        resumed.resume_or_load("", resume=True)


def test_nothing_to_resume_from_is_no_error(tmp_path, caplog) -> None:
    torch.save({"weight": torch.ones(40, 30)}, tmp_path / "pretrained.pth")
    (tmp_path / "last_checkpoint").touch()
    resumed = checkpointer(tmp_path)
    assert not resumed.has_checkpoint()
    resumed.resume_or_load(str(tmp_path / "pretrained.pth"), resume=True)
    assert (resumed.model.weight == 1).all()


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path) -> None:
    saving = save(tmp_path, 1)
    saving.model.register_buffer("running_var", torch.ones(3))
    before = content(tmp_path)
    getattr(saving.model, name).data.view(-1)[1] = torch.inf
    with pytest.raises(
        FloatingPointError, match=f"model_0000002.pth is not saved.* finite, {name}"
    ):
        saving.save("model_0000002")
    assert content(tmp_path) == before and resume(tmp_path) == (1, 1)


def test_buffers_that_are_infinite_by_design_are_saved(tmp_path) -> None:
    saving = save(tmp_path, 1)
    saving.model.register_buffer("smallest_loss", torch.tensor(torch.inf))
    saving.model.register_buffer("scales", torch.ones(3).to(torch.float8_e4m3fn))
    saving.save("model_0000002")
    assert (tmp_path / "model_0000002.pth").exists()


def test_a_model_on_the_meta_device_is_loaded_once_it_has_memory(tmp_path) -> None:
    save(tmp_path, 3)
    model = nn.Linear(30, 40, device="meta")
    loading = Checkpointer(model, str(tmp_path), trainer=State())
    model.to_empty(device="cpu")
    loading.resume_or_load("", resume=True)
    assert (model.weight == 3).all() and (model.bias == 3).all()


def test_weights_alone_are_not_resumed_from(tmp_path) -> None:
    loading = checkpointer(tmp_path)
    path = tmp_path / "pretrained_final.pth"
    torch.save({"model": loading.model.state_dict()}, path)
    loading.resume_or_load(str(path), resume=True)
    # Detectron2's trainer starts at 0 only if there is no checkpoint.
    assert loading.filename == str(path) and not loading.has_checkpoint()
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(UserError, match="no intact checkpoint"):
        loading.resume_or_load(str(path), resume=True)
    (tmp_path / "last_checkpoint").unlink()
    path.rename(tmp_path / "model_final.pth")  # training would overwrite it
    with pytest.raises(UserError, match="no intact checkpoint"):
        loading.resume_or_load("", resume=True)


def test_a_buffer_that_starts_as_infinite_is_saved(tmp_path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    Checkpointer(model, str(tmp_path)).save("model_final")
    assert resume_model(model, tmp_path).mask.isinf().all()


def resume_model(model: nn.Module, folder: Path) -> nn.Module:
    Checkpointer(model, str(folder)).resume_or_load("", resume=True)
    return model


def test_intact_checkpoints_are_resumed_in_silence(tmp_path, caplog) -> None:
    save(tmp_path, 0, 1, 2)
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == (2, 2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("saved", [False, True])
def test_a_last_checkpoint_that_is_a_folder_is_named(saved, tmp_path) -> None:
    if saved:
        save(tmp_path, 1)
        (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(UserError, match="last_checkpoint must be a file, but is a folder"):
        resume(tmp_path)


@pytest.mark.parametrize("text", ["model_final.pth\nmodel_0000001.pth", "x" * 9999, "a/" * 9999])
def test_a_last_checkpoint_that_is_no_name_is_one_short_line(text, tmp_path) -> None:
    (tmp_path / "last_checkpoint").write_text(text)
    with pytest.raises(UserError, match="must name a file of its folder") as caught:
        resume(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path)) and "\n" not in str(caught.value)
