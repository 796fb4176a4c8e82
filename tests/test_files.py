# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Locks: one holder at a time, named to the others, released by a kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dcn_plugin.files import FileLockedError, atomic_write, can_write, file_lock

ROOT = Path(__file__).resolve().parents[1]
# Holds the lock, forks a process that survives it, and prints the id of that process.
HOLDER = """
import os, sys, time, importlib.util
spec = importlib.util.spec_from_file_location("files", "dcn_plugin/files.py")
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
from pathlib import Path
with files.file_lock(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_lock_is_exclusive_and_names_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        child = int(holder.stdout.readline())
        try:
            owner = f"process {holder.pid} on {socket.gethostname()} since "
            expected = pytest.raises(FileLockedError, match=f"{path} is locked by {owner}")
            with expected as error, file_lock(path):
                pass
            assert error.value.owner.startswith(owner)
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # the forked process is alive, and does not hold the lock
            with file_lock(path):
                assert path.read_text().startswith(f"process {os.getpid()} on ")
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


def test_reading_the_lock_file_does_not_release_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "folder/lock"
    path.parent.mkdir()
    code = HOLDER.replace("time.sleep(60)", "print('second holder')")
    command = [sys.executable, "-c", code, str(path)]
    with file_lock(path):
        path.read_text()
        shutil.copytree(path.parent, tmp_path / "copy")  # such as a hook that uploads OUTPUT_DIR
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"is locked by process {os.getpid()} on " in done.stderr and not done.stdout


def test_a_forked_process_that_leaves_the_context_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = file_lock(path)
    lock.__enter__()
    leave = multiprocessing.get_context("fork").Process(target=lock.__exit__, args=(None,) * 3)
    leave.start()
    leave.join()
    assert leave.exitcode == 0
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    with pytest.raises(FileLockedError), file_lock(path):
        pass
    lock.__exit__(None, None, None)
    with file_lock(path):
        pass


def test_threads_and_nested_calls_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    refused = []

    def take() -> None:
        try:
            with file_lock(path):
                pass
        except FileLockedError as error:
            refused.append(error.owner)

    with file_lock(path):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        take()
    assert len(refused) == 2 and refused[0].startswith(f"process {os.getpid()} on ")
    take()
    assert len(refused) == 2 and path.read_text() == ""


def test_an_error_inside_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), file_lock(path):
        raise KeyError
    with file_lock(path):
        pass


def test_a_file_that_cannot_be_created_is_not_a_held_lock(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), file_lock(tmp_path / "none" / "lock"):
        pass


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch) -> None:
    flush, refused = os.fsync, []

    def fsync(descriptor: int) -> None:  # as FUSE and CIFS do
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert len(refused) == 1 and (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("before", ["old", None])
def test_a_link_is_written_through(before, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk/target", tmp_path / "link"
    link.symlink_to("disk/target")
    if before:
        target.write_text(before)
    with atomic_write(link) as temporary:
        assert temporary.parent == target.parent  # one file system, where a rename is atomic
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "disk", target, link]


def test_a_link_to_nowhere_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert can_write(tmp_path / "nowhere") and not can_write(tmp_path / "link")
