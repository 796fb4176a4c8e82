# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Atomic writes, folders to write to, and locks that end with the process that holds them."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dcn_plugin.messages import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    import msvcrt

LOCKED_BYTE = 1 << 30  # on Windows, beyond the text that other processes read


class FileLockedError(OSError):
    """Another process, or another thread of this one, holds a lock.

    Attributes:
        owner (str): "process <pid> on <host> since <time>".
    """

    def __init__(self, path: Path, owner: str) -> None:
        """Stores the owner; the path is that of the lock file."""
        super().__init__(f"{path} is locked by {owner}")
        self.owner = owner


class NoLocksError(UserError, OSError):
    """A file system does not support locks."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when that has succeeded.

    File and folder are flushed to the disk, so that `path` is either the old or the whole new file,
    also after a power failure; a folder as far as its file system supports that. If `path` is a
    symbolic link, the file that it leads to is written, and the link stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            with suppress(OSError):  # some network file systems and FUSE do not flush folders
                _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def can_write(folder: Path) -> bool:
    """Returns whether a folder can be written to, or created."""
    paths = folder, *folder.absolute().parents
    existing = next(path for path in paths if path.exists() or path.is_symlink())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def output_folder(text: str) -> Path:
    """Parses an option of `argparse` that names a folder to write to."""
    if not can_write(Path(text)):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written to, got {text!r}")
    return Path(text)


_held: set[IO[str]] = set()  # the files of the locks of this process


def _close_inherited() -> None:
    """Closes the parent's lock files in a forked process, which would keep the locks."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases when this process ends, however it ends.

    Forked processes do not inherit it. The file gets a line that names this process, and stays.

    Args:
        path: of the lock file, on a file system that supports locks. It is created.

    Raises:
        FileLockedError: if another process or thread holds the lock, without waiting for it.
        NoLocksError: if its file system does not support locks.
        OSError: if the file cannot be written.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    owner = f"process {os.getpid()} on {socket.gethostname()} since {now}"
    with path.open("a+") as file:
        _held.add(file)
        try:
            _lock(file, path)
            file.truncate(0)
            file.write(f"{owner}\n")
            file.flush()
            yield
            if not file.closed:  # as it is in a forked process
                file.truncate(0)
        finally:
            _held.discard(file)


def _lock(file: IO[str], path: Path) -> None:
    try:
        if os.name == "nt":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:  # not lockf, whose lock ends once this process closes any descriptor of the file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EWOULDBLOCK; EACCES on Windows
        file.seek(0)
        raise FileLockedError(path, file.readline().strip() or "another process") from error
    except OSError as error:
        raise NoLocksError(
            f"{path} cannot be locked ({error.strerror}): its file system may not support locks; "
            "use a folder on another one"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
