# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""One training run at a time in OUTPUT_DIR, and full disks."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from detectron2.utils import comm

from dcn_plugin.files import FileLockedError, NoLocksError, file_lock
from dcn_plugin.messages import UserError

from .checkpoint_files import remove_unfinished

LOCK = ".lock"
SPACE = 2**20  # bytes, more than the log of a start


@contextlib.contextmanager
def lock_output_dir(folder: str) -> Iterator[None]:
    """Keeps other training runs out of a folder; call it in every process, before the first write.

    The main process holds a lock that ends with it, however it ends, and removes what killed runs
    have left of files that they were writing. Evaluation needs no lock. An address of PathManager
    is not protected.

    Args:
        folder: OUTPUT_DIR, made if it does not exist.

    Raises:
        UserError: in the main process, if another run holds the lock. The other processes exit.
    """
    with ExitStack() as stack:
        error = None
        if comm.is_main_process():
            try:
                _lock(folder, stack)
            except (OSError, UserError) as caught:
                error = caught
        if comm.all_gather(error is not None)[0]:
            raise error or SystemExit(1)
        yield


def warn_of_training(folder: str) -> None:
    """Warns that evaluation writes to the folder of a training run that goes on or was killed.

    Args:
        folder: OUTPUT_DIR.
    """
    lock = Path(folder) / LOCK
    owner = lock.read_text(errors="replace").strip() if lock.is_file() else ""
    if owner and comm.is_main_process():
        logging.getLogger(__name__).warning(
            "OUTPUT_DIR %s is that of a training run, %s: config.yaml and results.json there are "
            "now those of this evaluation",
            *(folder, owner),
        )


def require_space(folder: str) -> None:
    """Tries to write 1 MiB to a local folder, in the main process.

    Args:
        folder: OUTPUT_DIR, made if it does not exist.

    Raises:
        UserError: if that fails, as on a full disk.
    """
    if "://" in folder or not comm.is_main_process():
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(SPACE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder} cannot be written to: {error.strerror}") from error


def _lock(folder: str, stack: ExitStack) -> None:
    logger = logging.getLogger(__name__)
    not_protected = f"OUTPUT_DIR {folder} is not protected from a second training run"
    if not folder:
        raise UserError("OUTPUT_DIR must be a folder that can be written to, got ''")
    if "://" in folder:
        logger.warning("%s: only local folders have locks", not_protected)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(file_lock(Path(folder) / LOCK))
    except FileLockedError as error:
        raise UserError(
            f"another training run writes to OUTPUT_DIR {folder}: {error.owner}. Stop it, or set "
            "another OUTPUT_DIR"
        ) from error
    except NoLocksError as error:
        logger.warning("%s: %s", not_protected, error)
        return
    remove_unfinished(Path(folder))
