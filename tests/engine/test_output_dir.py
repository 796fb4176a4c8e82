# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The lock of OUTPUT_DIR: who gets it, and what the others are told; full disks."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcn_plugin.engine import UserError, lock_output_dir
from dcn_plugin.engine.output_dir import require_space, warn_of_training
from tests.test_train_net import arguments, train_net

ROOT = Path(__file__).resolve().parents[2]
# Holds the lock, with a forked child that lives on, as a DataLoader's worker might.
HOLD = """
import os, sys, time
from dcn_plugin.engine import lock_output_dir
with lock_output_dir(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def other_process(folder: Path) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_run_names_the_first_until_it_is_killed(tmp_path, tiny_coco) -> None:
    output = tmp_path / "output"
    with other_process(output) as first:
        before = {path: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(SystemExit) as caught:
            train_net.main(arguments(tiny_coco, output))
        message = str(caught.value)
        holder = f"process {first.pid} on {socket.gethostname()} since 2"
        assert message.startswith("train_net: another training run writes to OUTPUT_DIR")
        assert holder in message and "\n" not in message
        assert {path: path.read_bytes() for path in output.iterdir()} == before
        train_net.main(arguments(tiny_coco, output, "--eval-only"))
        with pytest.raises(UserError), lock_output_dir(str(output)):
            pass
        (output / "model_final.pth.7.tmp").touch()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with lock_output_dir(str(output)):
            assert not (output / "model_final.pth.7.tmp").exists()
    with lock_output_dir(str(output)):  # it has ended
        assert str(os.getpid()) in (output / ".lock").read_text()


@pytest.mark.parametrize("case", ["no locks", "an address"])
def test_what_is_not_protected_is_said_once(case, tmp_path, monkeypatch, caplog) -> None:
    folder = str(tmp_path)
    if case == "no locks":

        def refuse(*arguments: object) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    else:
        folder = "s3://bucket/run"
    with caplog.at_level(logging.WARNING), lock_output_dir(folder):
        pass
    (line,) = caplog.messages
    assert line.startswith(f"OUTPUT_DIR {folder} is not protected from a second training run: ")
    assert case != "no locks" or "No locks available" in line


def test_an_empty_name_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="OUTPUT_DIR must be a folder"), lock_output_dir(""):
        pass
    assert not list(tmp_path.iterdir())


def test_an_evaluation_warns_of_a_training_run(tmp_path, caplog) -> None:
    warn_of_training(str(tmp_path))
    with lock_output_dir(str(tmp_path)):
        warn_of_training(str(tmp_path))
        assert f"that of a training run, process {os.getpid()} on " in caplog.text
    caplog.clear()
    warn_of_training(str(tmp_path))
    assert not caplog.text


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_full_disk_is_one_line_at_the_start(flags, tmp_path, monkeypatch, capfd) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    message = f"^train_net: OUTPUT_DIR {tmp_path}/a cannot be written to: Disk quota exceeded$"
    with pytest.raises(SystemExit, match=message):
        train_net.main(arguments("shapes_tiny_train", tmp_path / "a", *flags))
    assert capfd.readouterr().out == "" and not list((tmp_path / "a").iterdir())


def test_space_is_left_as_it_was(tmp_path) -> None:
    require_space(str(tmp_path / "a/b"))
    assert not list((tmp_path / "a/b").iterdir())
    require_space("remote://a")
