# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Counts, failures and resident memory of a part, printed once a minute."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.ops.peak_memory import MIB, resident

WARM_UP = 1 / 3  # of the time of a part: oneDNN compiles kernels, threads get memory arenas
MAX_GROWTH = 400  # MiB, after the warm-up


@dataclass
class Progress:
    """What a part has done so far.

    Attributes:
        part: its name.
        seconds: how long it shall run.
        counts: what was done, by name.
        failures: what went wrong, a line each; the part goes on.
        bounded: whether the memory of this process is checked.
    """

    part: str
    seconds: float
    bounded: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Starts the clock."""
        self._begin = time.monotonic()
        self._printed = 0
        self._warm = self._highest = 0
        self._lock = threading.Lock()

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self._begin

    def is_over(self, share: float = 1.0) -> bool:
        """Returns whether this share of the time is over; prints a line each minute."""
        with self._lock:
            self._sample()
            return self.elapsed() >= share * self.seconds

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a counter, from any thread."""
        with self._lock:
            self.counts[name] += number

    def fail(self, message: str) -> None:
        """Records and prints a failure, from any thread."""
        with self._lock:
            self.failures.append(message)
        print(f"FAILED: {self.part}: {message}", flush=True)

    def _sample(self) -> None:
        memory, elapsed = resident(), self.elapsed()
        self._highest = max(self._highest, memory)
        if elapsed <= WARM_UP * self.seconds:
            self._warm = self._highest
        if elapsed >= 60 * self._printed:
            self._printed += 1
            done = ", ".join(f"{number} {name}" for name, number in self.counts.items())
            print(
                f"{self.part}, {elapsed / 60:.0f} min: {memory / MIB:.0f} MiB; {done or 'start'}",
                flush=True,
            )

    def finish(self) -> None:
        """Checks the memory, and prints what was done."""
        growth = (self._highest - self._warm) / MIB
        memory = f"; {self._warm / MIB:.0f} MiB after a third of the time, then {growth:+.0f} MiB"
        if self.bounded and growth > MAX_GROWTH:
            self.fail(f"resident memory grew by {growth:.0f} MiB, more than {MAX_GROWTH}")
        done = ", ".join(f"{number} {name}" for name, number in sorted(self.counts.items()))
        print(
            f"== {self.part}: {done}; {len(self.failures)} failures in {self.elapsed():.0f} s"
            f"{memory if self.bounded else ''}",
            flush=True,
        )
