# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Errors for the user of a program, and parts of their messages."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from urllib.error import URLError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, or a size limit


class UserError(ValueError):
    """An error in a config, a command line or a file.

    Its message says what is wrong, the value found, what is allowed and what to do; programs print
    it without a traceback, see `exit_on_error`.
    """

    def __init__(self, message: str = "") -> None:
        """Stores the message.

        Args:
            message: or the traceback with which PyTorch raises the error of a DataLoader's worker
                again, whose last line is kept.
        """
        if "\nOriginal Traceback" in message:
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class MissingFileError(UserError, FileNotFoundError):
    """A `UserError` about a file that does not exist."""


@contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Ends a program with one line for errors that its user can correct; also a decorator.

    These are `UserError`, errors of the operating system that name a file, failed downloads (whose
    address is logged), and names that are not in Detectron2's registries. All others keep their
    traceback.

    Args:
        program: name at the start of the line.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {' '.join(str(error).splitlines())}")
    except URLError as error:
        sys.exit(f"{program}: a download failed, {error}: name a local file instead")
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # of torch.save
        if not isinstance(cause, OSError):
            raise
        if cause.errno in DISK_FULL and not cause.filename:  # in a flush
            sys.exit(f"{program}: {cause.strerror}: free some where it writes, as in OUTPUT_DIR")
        if cause is not error or not cause.filename or not cause.strerror:
            raise
        sys.exit(f"{program}: {cause.filename}: {cause.strerror}")
    except KeyError as error:
        if not re.search("No object named .+ found in .+ registry", str(error)):  # of Registry.get
            raise
        sys.exit(f"{program}: {error.args[0]}")


def one_line(error: object) -> str:
    """Returns the message of an error on one line."""
    return " ".join(str(error).split())


def got(name: object, known: Iterable[str]) -> str:
    """Returns "got <name>", with the nearest known names.

    Args:
        name: a value that is not allowed.
        known: the values that are.
    """
    return f"got {name!r}{nearest(name, known)}"


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns "; the nearest: <names>", or nothing if no known name is similar."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(near)}" if near else ""
