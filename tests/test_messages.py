# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Which errors end a program with one line, and which keep their traceback."""

from __future__ import annotations

import contextlib
import errno
import pickle
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dcn_plugin.messages import MissingFileError, UserError, exit_on_error

FULL = Path("/dev/full")  # refuses what is written to it


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("SEED must be a number, got x"), "SEED must be a number, got x"),
        (UserError("while parsing\n  line 3"), "while parsing   line 3"),
        (MissingFileError("--weights must be a file, got x"), "--weights must be a file, got x"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or d"),
        (PermissionError(13, "Permission denied", "/root"), "/root: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: free some"),
        (URLError("no network"), "a download failed, <urlopen error no network>: name a local"),
        (HTTPError("http://x", 404, "Not Found", {}, None), "a download failed, HTTP Error 404"),
        (KeyError("No object named 'a' found in 'B' registry!"), "No object named 'a' found in"),
    ],
)
def test_errors_of_the_user_are_one_line(error: Exception, line: str) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error("program"):
        raise error
    assert str(caught.value).startswith(f"program: {line}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("could not convert string to float: 'abc'"),
        UnicodeDecodeError("utf-8", b"\x89", 0, 1, "invalid start byte"),
        OSError("image file is truncated"),
        KeyError("a key"),
        KeyError("image_registry"),
        AssertionError(),
        ModuleNotFoundError("No module named 'x'", name="x"),
    ],
)
def test_unforeseen_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, exit_on_error("program"):
        raise error
    assert caught.value is error


@pytest.mark.skipif(not FULL.exists(), reason="Linux only")
def test_a_full_disk_is_one_line_in_torch_save_too() -> None:
    file = FULL.open("wb")
    with pytest.raises(SystemExit) as caught, exit_on_error("program"):
        torch.save({"weight": torch.ones(9999)}, file)
    with contextlib.suppress(OSError):
        file.close()
    assert str(caught.value).startswith("program: No space left on device: free some")
    assert isinstance(caught.value.__context__, RuntimeError)
    with pytest.raises(RuntimeError, match="another"), exit_on_error("program"):
        try:
            raise OSError(errno.EIO, "Input/output error")
        finally:
            raise RuntimeError("another")


class Damaged(Dataset[int]):
    """A data set whose only item cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UserError("a.jpg cannot be read: OSError: truncated")


def test_errors_in_processes_of_a_loader_are_one_line_too() -> None:
    with pytest.raises(SystemExit) as caught, exit_on_error("program"):
        next(iter(DataLoader(Damaged(), num_workers=1)))
    assert str(caught.value) == "program: a.jpg cannot be read: OSError: truncated"


def test_missing_files_are_file_not_found_errors_too() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        raise MissingFileError("no file")
    copy = pickle.loads(pickle.dumps(caught.value))  # as processes of torch.multiprocessing do
    assert isinstance(copy, UserError) and str(copy) == "no file"


def test_a_decorated_program_can_run_twice(tmp_path: Path) -> None:
    @exit_on_error("program")
    def main(name: str) -> str:
        return (tmp_path / name).read_text()

    (tmp_path / "a").write_text("text")
    assert main("a") == "text"
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"program: .*b: No such file"):
            main("b")
