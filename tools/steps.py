# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Steps that are done once: stamps, times, and errors that say what to do. Used by setup."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

TAIL = 15  # lines of a failed tool's output that are shown

# What a tool prints where it fails, and what helps. The first that matches is shown.
ADVICE = (
    (r"No space left on device|Disk quota exceeded", "the disk is full: free some space"),
    (r"Python\.h: No such file", "the headers of Python are missing: `apt install python3-dev`"),
    (r"ensurepip is not available", "venv is incomplete: `apt install python3-venv`"),
    (r"Killed signal|signal 9|: Killed", "the memory did not do: try `make setup MAX_JOBS=1`"),
    (r"do not match the hashes", "a download is not the expected file: see the log"),
    (r"CERTIFICATE_VERIFY_FAILED", "a proxy with its own certificate? set PIP_CERT to its file"),
    (
        r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|"
        r"Network is unreachable|Connection refused|ConnectTimeout|Read timed out|ProxyError|"
        r"Max retries exceeded|ConnectionError|Connection aborted|Cannot connect to proxy",
        "pip got no connection: is there a network, does it need a proxy (HTTPS_PROXY)?",
    ),
    (
        r"No matching distribution found",
        "a pinned package is not on offer: no network, or a Python or machine without it",
    ),
)


class Problem(Exception):
    """What went wrong, and what the user can do about it."""

    def __init__(self, what: str, advice: str | None = None) -> None:
        """Keep both; they are printed one under the other."""
        super().__init__(what + (f"\n  What to do: {advice}" if advice else ""))


class Step(NamedTuple):
    """One step: what it depends on, what it does, and whether its result is there.

    `action` gets whether an earlier attempt at it was cut short, and may return a remark.
    """

    name: str
    title: str
    inputs: Callable[[], list[str | bytes]]
    action: Callable[[bool], str | None]
    is_there: Callable[[], bool] = lambda: True


def digest(parts: Iterable[str | bytes]) -> str:
    """Return one hash of several texts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()


def advice_for(output: str) -> str | None:
    """Return what to do about a tool's failure, where its output is of a known kind."""
    for pattern, advice in ADVICE:
        if re.search(pattern, output):
            return advice
    return None


def run_logged(command: list[str], log: Path, environment: dict[str, str], folder: Path) -> str:
    """Run a command with its output in the log; return it, or raise a Problem with its end."""
    with log.open("a+") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        start = file.tell()
        # The child keeps the lock: where only this process is killed, a later run waits for it.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            pass_fds=Runner.held,
        )
        file.seek(start)
        output = file.read()
    if done.returncode != 0:
        tail = "\n".join(f"  | {line}" for line in output.rstrip().splitlines()[-TAIL:])
        raise Problem(f"{Path(command[0]).name} failed ({log}):\n{tail}", advice_for(output))
    return output


class Runner:
    """Runs steps in order and keeps their stamps in a folder."""

    held: tuple[int, ...] = ()  # the file descriptor of the lock, while it is held

    def __init__(self, stamps: Path) -> None:
        """Use the stamps of a folder, which need not be there yet."""
        self.stamps = stamps

    @classmethod
    @contextlib.contextmanager
    def alone(cls, lock: Path) -> Iterator[None]:
        """Keep a second run from working on the same folder at the same time."""
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another setup still works on this folder: waiting for its end", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            cls.held = (file.fileno(),)
            try:
                yield
            finally:
                cls.held = ()

    def recorded(self, name: str) -> str | None:
        """Return what was recorded under a name."""
        try:
            return (self.stamps / name).read_text()
        except OSError:
            return None

    def record(self, name: str, text: str) -> None:
        """Record a text; whoever is killed meanwhile leaves the old one or the new one."""
        unfinished = self.stamps / f"{name}.tmp"
        unfinished.write_text(text)
        os.replace(unfinished, self.stamps / name)

    def was_interrupted(self, step: Step) -> bool:
        """Tell whether a step was begun and not finished."""
        return (self.stamps / f"{step.name}.begun").exists()

    def is_done(self, step: Step, before: str) -> bool:
        """Tell whether a step was done with these inputs, after that state of the one before."""
        stamp = self.recorded(f"{step.name}.done")
        return (
            stamp == self.state(step, before) and not self.was_interrupted(step) and step.is_there()
        )

    @staticmethod
    def state(step: Step, before: str) -> str:
        """Return the hash of a step's inputs and of the state of the one before."""
        return digest([before, step.name, *step.inputs()])

    def all_done(self, steps: list[Step]) -> bool:
        """Tell whether nothing is left to do."""
        before = ""
        for step in steps:
            if not self.is_done(step, before):
                return False
            before = self.state(step, before)
        return True

    def run_all(self, steps: list[Step]) -> None:
        """Run the steps that are not done, each with a line and its time."""
        before = ""
        for number, step in enumerate(steps, 1):
            label = f"[{number}/{len(steps)}] {step.title}"
            state = self.state(step, before)
            if self.is_done(step, before):
                print(f"{label.split(' (')[0]}: already done", flush=True)
            else:
                self._run(step, state, label)
            before = state

    def _run(self, step: Step, state: str, label: str) -> None:
        print(f"{label} ... ", end="", flush=True)
        start = time.monotonic()
        interrupted = self.was_interrupted(step)
        self.stamps.mkdir(parents=True, exist_ok=True)
        self.record(f"{step.name}.begun", "")
        try:
            remark = step.action(interrupted)
        except Problem as problem:
            print(f"failed after {time.monotonic() - start:.0f} s", flush=True)
            raise Problem(f"the step {step.name!r} failed. {problem}") from None
        self.record(f"{step.name}.done", state)
        (self.stamps / f"{step.name}.begun").unlink()
        note = f" ({remark})" if remark else ""
        print(f"{time.monotonic() - start:.1f} s{note}", flush=True)
