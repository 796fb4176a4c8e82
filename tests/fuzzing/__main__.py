# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Fuzzes the compiled ops under sanitizers, guided by the coverage of their C++ code.

    make fuzz [FUZZ_MINUTES=60]

builds the ops with the address and undefined-behaviour sanitizers, installs atheris (libFuzzer for
Python) in a folder of its own, and runs this. Inputs of libFuzzer become random calls through
Hypothesis: tests/fuzzing/calls.py. It prints how many calls of each function ended how, and the
coverage. A finding does not stop it: it is printed once, with the command that repeats it, and the
exit code is 1 in the end.

    make fuzz FUZZ_REPLAY=build/fuzz/findings/crash-...

repeats one call. The corpus is kept in build/fuzz/corpus for the next run.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COUNTERS = ROOT / "counters.so"  # counters.c, compiled
CALL_SECONDS = 60  # of the slowest call: ten times what any took on a busy machine
MAX_BYTES = 2048  # of an input: more than any call draws
SEEDS = 300
EXECUTIONS = "executions"
FOUND = "dcn_plugin found"  # begins a line of a worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", type=Path, default=ROOT, help="of corpus and findings")
    parser.add_argument("--replay", type=Path, help="a finding to repeat")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay:
        replay(options.replay)
    elif options.worker is not None:
        work(options)
    else:
        sys.exit(fuzz(options))


def fuzz(options: argparse.Namespace) -> int:
    """Runs workers until the time is over: a crash ends a worker. Returns the exit code."""
    seed_corpus(options.folder / "corpus")
    (options.folder / "findings").mkdir(exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    findings: dict[str, str] = {}
    total: Counter[str] = Counter()
    problem = ""
    while not problem and ((left := deadline - time.monotonic()) > 0 or not total):
        words = [sys.executable, "-m", "tests.fuzzing", "--worker", str(max(left, 1))]
        problem = run_worker([*words, "--folder", str(options.folder)], findings)
        total.update(json.loads((options.folder / "counts.json").read_text()))
    print_counts(total)
    print(f"{total[EXECUTIONS]} executions, {len(findings)} findings{problem}")
    return 1 if findings or problem else 0


def seed_corpus(folder: Path) -> None:
    """Writes random inputs for a start: libFuzzer begins with one byte, which is no call."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for i in range(0 if any(folder.iterdir()) else SEEDS):
        (folder / f"random-{i}").write_bytes(generator.randbytes(MAX_BYTES))


def run_worker(words: list[str], findings: dict[str, str]) -> str:
    """Runs a worker, prints libFuzzer's lines on coverage, and adds to `findings`.

    Args:
        words: its command.
        findings: what was found, the same text for the same fault, and the file of the input.

    Returns:
        what is wrong if it ended neither in time nor by a finding.
    """
    report: list[str] = []
    crashes: list[str] = []
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if re.match(r"#\d+\s+(INITED|pulse|DONE)", line):
                print(line.rstrip(), flush=True)
            elif re.search(r"runtime error: |ERROR: |^Traceback ", line) or report:
                report = [*report, line.rstrip()][:60]  # of a sanitizer, libFuzzer or Python
            if found := re.match(f"{FOUND} (.*) in (.*)", line):
                add_finding(findings, found[1], found[2])
            if found := re.search(r"Test unit written to (\S+)", line):
                crashes.append(found[1])
    print(*report, sep="\n", flush=True)
    for path in crashes:  # libFuzzer names the file of a timeout before it says what happened
        add_finding(findings, normalized(report[0] if report else "a crash"), path)
    failed = worker.returncode and not crashes
    return f"; a worker ended with {worker.returncode}" if failed else ""


def add_finding(findings: dict[str, str], what: str, path: str) -> None:
    """Adds and prints what was not found before."""
    if what not in findings:
        findings[what] = path
        print(f"FOUND: {what}\n  repeat: make fuzz FUZZ_REPLAY={path}", flush=True)


def normalized(message: str) -> str:
    """Returns the first line of a message without its numbers."""
    return re.sub(r"0x[0-9a-f]+|\d+", "N", message.splitlines()[0])[:300]


def print_counts(total: Counter[str]) -> None:
    """Prints a table: a line per function with how its calls ended."""
    kinds: dict[str, dict[str, int]] = {}
    for key, count in total.items():
        name, _, kind = key.partition(": ")
        if kind:
            kinds.setdefault(name, {})[kind] = count
    for name, ended in sorted(kinds.items()):
        shown = ", ".join(f"{kind} {count}" for kind, count in sorted(ended.items()))
        print(f"{name:29s} {sum(ended.values()):8d}: {shown}")


def draw_from_full_ranges() -> None:
    """Lets Hypothesis draw all integers of a range from bytes.

    From a range of n numbers it draws only those below n, and retries for others: ranges that do
    not begin at 0 lose numbers or never end (seen with 6.168).
    """
    from hypothesis import core

    class FullRanges(core.BytestringProvider):
        def draw_integer(
            self, min_value: int | None = None, max_value: int | None = None, **options: Any
        ) -> int:
            if min_value is None or max_value is None:
                return super().draw_integer(min_value, max_value, **options)
            span = max_value - min_value
            return min_value + self._draw_bits(span.bit_length()) % (span + 1)

    core.BytestringProvider = FullRanges


def target() -> Any:
    """Returns the function that makes a call of bytes and checks it."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    draw_from_full_ranges()
    ctypes.CDLL(COUNTERS, ctypes.RTLD_GLOBAL)  # the ops need it
    from tests.fuzzing.calls import Call, Comparison, calls, comparisons

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    # Comparisons take ten times as long.
    @given(call=st.integers(0, 15).flatmap(lambda n: calls() if n else comparisons()))
    def check(call: Call | Comparison) -> None:
        call.check()

    return check.hypothesis.fuzz_one_input


def replay(path: Path) -> None:
    """Repeats a finding, with Python's traceback or the report of a sanitizer."""
    target()(path.read_bytes())
    print(f"{path}: nothing was found")


def work(options: argparse.Namespace) -> None:
    """Runs libFuzzer in this process, until a crash or the time is over."""
    import atheris
    from atheris import core_with_libfuzzer

    check = target()
    register_counters(ctypes.CDLL(core_with_libfuzzer.__file__), ctypes.CDLL(COUNTERS))
    from tests.fuzzing.calls import outcomes

    executions, saved = 0, 0.0
    findings: set[str] = set()

    def save() -> None:
        counts = {f"{name}: {kind}": n for (name, kind), n in outcomes.items()}
        (options.folder / "counts.json").write_text(json.dumps({**counts, EXECUTIONS: executions}))

    def run(data: bytes) -> None:
        nonlocal executions, saved
        executions += 1
        if time.monotonic() - saved > 2:  # nothing runs in a process that a sanitizer ends
            saved = time.monotonic()
            save()
        try:
            check(data)
        except Exception as error:
            what = normalized(f"{type(error).__name__}: {error}")
            if what not in findings:
                findings.add(what)
                path = options.folder / "findings" / hashlib.sha256(data).hexdigest()[:16]
                path.write_bytes(data)
                print(f"{FOUND} {what} in {path}", flush=True)

    save()
    atheris.Setup(
        [
            "fuzz",
            str(options.folder / "corpus"),
            f"-artifact_prefix={options.folder}/findings/",
            f"-max_total_time={int(options.worker)}",
            f"-timeout={CALL_SECONDS}",
            "-rss_limit_mb=8192",
            f"-max_len={MAX_BYTES}",
            "-len_control=0",
        ],
        run,
    )
    atheris.Fuzz()


def register_counters(libfuzzer: ctypes.CDLL, counters: ctypes.CDLL) -> None:
    """Hands the counters of the C++ code to libFuzzer, as Clang's instrumentation would do."""
    size = 1 << 18  # COUNTERS in counters.c
    first = ctypes.addressof((ctypes.c_uint8 * size).in_dll(counters, "dcn_counters"))
    addresses = (ctypes.c_size_t * (2 * size)).in_dll(counters, "dcn_addresses")
    addresses[::2] = range(1, size + 1)
    for name, begin, length in (
        ("__sanitizer_cov_8bit_counters_init", first, size),
        ("__sanitizer_cov_pcs_init", ctypes.addressof(addresses), ctypes.sizeof(addresses)),
    ):
        getattr(libfuzzer, name)(ctypes.c_void_p(begin), ctypes.c_void_p(begin + length))


if __name__ == "__main__":
    main()
