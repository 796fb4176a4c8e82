# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""One training run at a time in OUTPUT_DIR."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from detectron2.utils import comm

from .checkpoint_files import remove_unfinished

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def lock_output_dir(folder: str) -> Iterator[None]:
    """Keeps other training runs out of a folder; call it in every process, before the first write.

    The main process holds a lock that ends with it, however it ends, and removes what killed runs
    have left of files that they were writing. Evaluation needs no lock. An address of PathManager
    is not protected.

    Args:
        folder: OUTPUT_DIR, made if it does not exist.

    Raises:
        BlockingIOError: in the main process, if another run holds the lock. The other processes
            exit.
    """
    error, file = None, None
    if comm.is_main_process():
        try:
            file = _lock(folder)
        except OSError as caught:
            error = caught
    if comm.all_gather(error is not None)[0]:
        raise error or SystemExit(1)
    try:
        yield
    finally:
        if file is not None:
            file.close()  # ends the lock


def _lock(folder: str) -> IO[str] | None:
    if "://" in folder or fcntl is None:
        _warn(folder, "only local folders on POSIX systems have locks")
        return None
    os.makedirs(folder, exist_ok=True)
    path = Path(folder) / LOCK
    file = path.open("a+")
    try:
        # Unlike flock, forked workers do not inherit it. It ends too if this process closes another
        # descriptor of the file: nothing else may open it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "a process that has just started"
        file.close()
        raise BlockingIOError(
            f"another training run writes to OUTPUT_DIR {folder}: {holder}. Stop it, or set "
            "another OUTPUT_DIR"
        ) from error
    except OSError as error:  # a file system without locks
        _warn(folder, str(error))
        file.close()
        return None
    file.truncate(0)
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started at {now}\n")
    file.flush()
    remove_unfinished(path.parent)
    return file


def _warn(folder: str, why: str) -> None:
    logging.getLogger(__name__).warning(
        "OUTPUT_DIR %s is not protected from a second training run: %s", folder, why
    )
