# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Starting processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from dcn_plugin.engine import launch
from dcn_plugin.engine.launch import forward_sigterm, run
from dcn_plugin.engine.sigterm import exit_on_sigterm


def test_more_gpus_than_there_are_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="--num-gpus is 3, but PyTorch finds 2 GPUs"):
        launch(lambda args: None, Namespace(num_gpus=3, num_machines=1))


@pytest.mark.parametrize(("gpus", "machines"), [(-1, 1), (1, 0)])
def test_numbers_of_processes_are_checked(gpus, machines) -> None:
    with pytest.raises(SystemExit, match=f"1 or more, got {gpus} and {machines}"):
        launch(lambda args: None, Namespace(num_gpus=gpus, num_machines=machines))


@pytest.mark.parametrize("rank", [-1, 2, 5])
def test_a_machine_rank_beyond_the_machines_is_one_line(rank) -> None:
    arguments = Namespace(num_gpus=1, num_machines=2, machine_rank=rank, dist_url="")
    with pytest.raises(SystemExit, match=f"below --num-machines, 2, got {rank}"):
        launch(lambda args: None, arguments)


@pytest.mark.parametrize(("code", "status"), [(1, 1), (143, 143), (-signal.SIGTERM, 143)])
def test_the_exit_code_is_that_of_the_process(code, status, monkeypatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ProcessExitedException("", error_index=0, error_pid=1, exit_code=code)

    monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", fail)
    arguments = Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        launch(lambda args: None, arguments)
    assert caught.value.code == status and signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("gpus", "machines", "handler"),
    [(0, 1, exit_on_sigterm), (1, 1, exit_on_sigterm), (1, 2, forward_sigterm)],
)
def test_processes_are_started_on_several_machines_too(
    gpus, machines, handler, monkeypatch
) -> None:
    found = []

    def detectron2_launch(*arguments: object, **options: object) -> None:
        found.append(signal.getsignal(signal.SIGTERM))

    monkeypatch.setattr(sys.modules[launch.__module__], "detectron2_launch", detectron2_launch)
    launch(print, Namespace(num_gpus=gpus, num_machines=machines, machine_rank=0, dist_url=""))
    assert found == [handler]


@pytest.fixture
def default_sigterm() -> Iterator[None]:
    """Sets the handler that a new process has, not that of another test."""
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.usefixtures("default_sigterm")
def test_sigterm_is_forwarded_to_the_processes_that_were_started(monkeypatch) -> None:
    children = [multiprocessing.Process(target=time.sleep, args=(60,)) for _ in range(2)]
    active_children = multiprocessing.active_children
    # Workers of a DataLoader of another test may be alive.
    monkeypatch.setattr(
        multiprocessing,
        "active_children",
        lambda: [child for child in active_children() if child in children],
    )
    for child in children:
        child.start()
    forward_sigterm(signal.SIGTERM, None)
    for child in children:
        child.join(60)
        assert child.exitcode == -signal.SIGTERM
    with pytest.raises(SystemExit) as caught:  # none to wait for
        forward_sigterm(signal.SIGTERM, None)
    assert caught.value.code == 143


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, SystemExit), (0, RuntimeError)])
@pytest.mark.usefixtures("default_sigterm")
def test_an_error_in_place_of_the_exit_changes_no_exit_code(number: int, kind: type) -> None:
    """Seen with OmegaConf, whose clean-up failed on a config that was half made."""

    def interrupted(args: Namespace) -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            raise RuntimeError("half made")

    with pytest.raises(kind) as caught:
        run(interrupted, Namespace())
    assert getattr(caught.value, "code", 143) == 143
