# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Faults of a data set: how many of each kind, and where the first ones are."""

from __future__ import annotations

import reprlib
from typing import Any

from dcn_plugin.messages import UserError

EXAMPLES = 3  # of each kind
HINT = ". tools/check_dataset.py lists all faults"
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


class DataError(UserError):
    """A file of a data set is faulty. The message is one line, which names the file."""


class Faults:
    """Collects the faults of a data set.

    Attributes:
        errors (dict[str, list[str]]): by kind, the places of the first ones, then empty strings.
        warnings (dict[str, list[str]]): likewise.
    """

    def __init__(self, path: str = "") -> None:
        """Starts with none.

        Args:
            path: of the file, if places do not name it.
        """
        self.path = path
        self.errors: dict[str, list[str]] = {}
        self.warnings: dict[str, list[str]] = {}

    def error(self, kind: str, place: str, value: Any = None) -> None:
        """Adds what training or evaluation would fail or be wrong with.

        Args:
            kind: what is wrong, in the plural, and what is allowed.
            place: where, with the value found.
            value: found, if it is not in the place.
        """
        _add(self.errors, kind, place, value)

    def warning(self, kind: str, place: str, value: Any = None) -> None:
        """Adds what Detectron2 ignores or corrects; the arguments are those of `error`."""
        _add(self.warnings, kind, place, value)

    def make_warning(self, kind: str) -> None:
        """Turns a kind of error, if it is one, into a warning."""
        if kind in self.errors:
            self.warnings[kind] = self.errors.pop(kind)

    def lines(self) -> list[str]:
        """Returns a line for each kind, errors first."""
        parts = (("error", self.errors), ("warning", self.warnings))
        return [
            f"{level}: {self.describe(kind, places)}"
            for level, faults in parts
            for kind, places in faults.items()
        ]

    def describe(self, kind: str, places: list[str]) -> str:
        """Returns one line: the file, the kind, the count and the first places.

        Args:
            kind: of `errors` or `warnings`.
            places: its value there.
        """
        file = f"{self.path}: " if self.path else ""
        return f"{file}{kind} ({len(places)}): {'; '.join(places[:EXAMPLES])}"

    def raise_error(self, source: str) -> None:
        """Raises a DataError with the first kind of error, if there is one.

        Args:
            source: the data set.
        """
        if self.errors:
            first, *others = self.errors.items()
            more = f"; other kinds of errors: {len(others)}" if others else ""
            raise DataError(f"{source}: {self.describe(*first)}{more}{HINT}")


def _add(faults: dict[str, list[str]], kind: str, place: str, value: Any) -> None:
    places = faults.setdefault(kind, [])
    if len(places) >= EXAMPLES:
        place = ""
    elif value is not None:
        place = f"{place}: {short(value)}"
    places.append(place)


def short(value: Any) -> str:
    """Returns a value in one short line."""
    return SHORT.repr(value)
