# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Files of checkpoints: how they are written, what is wrong with one, and which are older."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from dcn_plugin.files import atomic_write
from dcn_plugin.messages import DISK_FULL, UserError, one_line

# As Detectron2's hooks name them by default; others are found by last_checkpoint.
NAME = re.compile(r"model_(\d{7,}|final|best)\.pth")
CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # to be finite
# What zipfile raises for a damaged file.
DAMAGED = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class CheckpointWriteError(UserError, OSError):
    """A checkpoint cannot be written, such as on a full disk."""


def other_run(difference: str) -> UserError:
    """Returns the error for a checkpoint that a run cannot resume from.

    Args:
        difference: between the checkpoint and the run.
    """
    return UserError(
        f"the checkpoint to resume from is of another model or optimizer: {difference}. Resume "
        "with the config that it was trained with, or train in a new OUTPUT_DIR with MODEL.WEIGHTS"
    )


def save_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Writes a file that is either whole or not there.

    Args:
        path: in a local folder; a file there is replaced once the new one is on the disk.
        write: called with the open file.

    Raises:
        CheckpointWriteError: if the disk is full, or the file system refuses the file. The message
            is one line with path and size.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save hides the OSError in its context
        cause = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
        if cause is None:
            raise
        sizes = ""
        if cause.errno in DISK_FULL:
            counter = ByteCounter()
            write(counter)
            free = shutil.disk_usage(path.resolve().parent).free  # of the target of a link
            sizes = f": it needs {counter.size:,} bytes, {free:,} are free on the disk"
        raise CheckpointWriteError(
            f"{path} cannot be written, {cause.strerror}{sizes}; earlier checkpoints are unchanged"
        ) from None


class ByteCounter(io.RawIOBase):
    """Counts the bytes that are written to it."""

    size = 0

    def write(self, content: Any) -> int:
        self.size += len(content)
        return len(content)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left of checkpoints that they were writing."""
    for path in folder.glob("*.tmp"):
        if re.fullmatch(r"(.+\.pth|last_checkpoint)\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def checkpoint_names(folder: str) -> list[str]:
    """Returns the files in a local folder that are named like checkpoints of training."""
    if not os.path.isdir(folder):  # one of PathManager's addresses, or not there
        return []
    return sorted(name for name in os.listdir(folder) if NAME.fullmatch(name))


def iteration_in_name(name: str) -> int | None:
    """Returns the iteration in the name of a checkpoint, or None, as for model_final.pth."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match and match[1].isdecimal() else None


def damage(path: str) -> str:
    """Returns what is wrong with a file, without loading it; nothing if its checksums are right.

    Args:
        path: a local file; of PyTorch's format before 1.6, which has no checksums, only its size is
            checked.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            return "it is not a regular file"
        with open(path, "rb") as file:
            start = file.read(4)
        if not start:
            return "it is empty"
        if start == b"PK\x03\x04":  # a zip file, whose index is at its end
            if not zipfile.is_zipfile(path):
                return "its end is missing"
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    return f"the checksum of its part {wrong} is wrong"
    except FileNotFoundError:
        return "it does not exist"
    except DAMAGED as error:
        return f"it is damaged, {one_line(error)}"
    return ""


def not_finite(state: Mapping[str, Any], names: Container[str]) -> list[str]:
    """Returns the names of tensors that have an infinite element or NaN.

    Args:
        state: of a model.
        names: of the tensors to check. Those of sparse layouts, of 8 bits and on the meta device
            pass.
    """
    return [
        name
        for name, value in state.items()
        if name in names
        and isinstance(value, torch.Tensor)
        and value.dtype in CHECKED
        and value.layout == torch.strided
        and not is_lazy(value)
        and not value.is_meta
        and not value.isfinite().all()
    ]
