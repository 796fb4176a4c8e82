# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""SIGTERM in the workers of a DataLoader."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from dcn_plugin.data import workers
from dcn_plugin.data.workers import ignore_sigterm_of_others, sigterm_blocked


def test_workers_end_by_their_parents_signal_alone(monkeypatch) -> None:
    monkeypatch.setattr(workers, "SECONDS", 600.0)  # inherited by forked workers
    loader = DataLoader(range(200), num_workers=2, worker_init_fn=ignore_sigterm_of_others)
    with sigterm_blocked():  # until the workers' own threads wait for it
        batches = iter(loader)
    taken = [int(next(batches))]
    for worker in batches._workers:  # from another process, as by a scheduler
        os.system(f"kill -TERM {worker.pid}")
    taken += [int(batch) for batch in batches]
    assert taken == list(range(200))
    with sigterm_blocked():
        batches = iter(loader)
    next(batches)
    for worker in batches._workers:
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0


def test_workers_end_later_by_the_signal_of_others(monkeypatch) -> None:
    monkeypatch.setattr(workers, "SECONDS", 0.5)  # inherited by forked workers
    loader = DataLoader(range(200), num_workers=1, worker_init_fn=ignore_sigterm_of_others)
    with sigterm_blocked():
        batches = iter(loader)
    (worker,) = batches._workers
    os.system(f"kill -TERM {worker.pid}")
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_processes_inherit_that_the_signal_is_blocked() -> None:
    def blocked(pid: int) -> bool:
        (line,) = [
            line
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("SigBlk:")
        ]
        return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    with sigterm_blocked():
        child = subprocess.Popen(["sleep", "60"])
        assert blocked(os.getpid())
    assert blocked(child.pid) and not blocked(os.getpid())
    child.kill()
    child.wait()
