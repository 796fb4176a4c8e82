# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reads the outputs of the stages of gpu_check.py, and writes its Markdown report.

A `read_...` function returns the detail of a stage's line and what was measured; "missing" if the
output has no result. It may get the start of an output only, since a stage can run out of time.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Read = tuple[str, dict[str, Any]]


def read_probe(text: str) -> Read:
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    gpu = found.get("gpu") or "no GPU that PyTorch can use"
    parts = [gpu, *(f"{name} {found.get(name) or 'missing'}" for name in ("torch", "nvcc"))]
    return (", ".join(parts), found) if found else ("PyTorch does not work", {"missing": True})


def read_build(text: str) -> Read:
    lines = sorted({line for line in text.splitlines() if re.search(r"csrc/.*\bwarning\b", line)})
    return f"{len(lines)} warnings", {"warnings": lines}


def read_tests(text: str) -> Read:
    """Counts pytest's lines of progress (-v), since the last line is missing after a time-out."""
    state, test = "(PASSED|FAILED|SKIPPED|ERROR|XFAIL)", "(tests/.+)"
    progress = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] {state} {test}|{test} {state}\b.*)$", re.M)
    states = [(a or d, b or c) for a, b, c, d in progress.findall(text)]
    counts = Counter(state.lower() for state, _ in states)
    failed = sorted({test.strip() for state, test in states if state in ("FAILED", "ERROR")})
    detail = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    measured = {"counts": dict(counts), "failed": failed}
    return (detail, measured) if counts else ("no test ran", {**measured, "missing": True})


def read_emulator(text: str) -> Read:
    """Adds the counts of the runs of pytest in `make emulate`."""
    counts: Counter[str] = Counter()
    for summary in re.findall(r"^.*\bin \d[\d.:]*s.*$", text, re.M):
        for count, state in re.findall(r"(\d+) (passed|failed|skipped|error)", summary):
            counts[state] += int(count)
    detail = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    measured = {"counts": dict(counts), **({} if counts else {"missing": True})}
    return f"no GPU: in the emulator, {detail or 'no test ran'}", measured


def read_sanitizer(text: str) -> Read:
    """Counts the calls that were finished, the errors, and the kernels in which they were."""
    if "Device not supported" in text:
        return "compute-sanitizer does not support this GPU or driver", {"skip": True}
    calls = len(re.findall(r"^done: ", text, re.M))
    summary = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
    named = re.sub(r"(<unnamed>|\(anonymous namespace\))::", "", text)
    kernels = Counter(re.findall(r"^=========\s+at (?:void )?([\w:]+)", named, re.M))
    errors = int(summary[-1]) if summary else None
    counted = "no summary" if errors is None else f"{errors} errors"
    measured = {"calls": calls, "errors": errors, "kernels": dict(kernels.most_common())}
    if errors is None or not calls:
        measured["missing"] = True
    return f"{counted} in {calls} calls", measured


def read_benchmark(path: Path) -> Read:
    """Reads the rows that the benchmark wrote, all of them or those until it was ended."""
    if not path.exists():
        return "nothing was measured", {"missing": True}
    content = json.loads(path.read_text())
    if not content["rows"]:
        content["missing"] = True
    problems = "".join(f"; {problem}" for problem in content["problems"])
    return f"{len(content['rows'])} rows{problems}", content


def markdown(report: dict[str, Any]) -> str:
    """Returns the report for a reader: stages, machine, failures and times."""
    stages = {stage["name"]: stage for stage in report["stages"]}
    lines = [f"# GPU check: {verdict(stages.values())}", ""]
    lines += table(
        ("stage", "seconds", "status", "detail"),
        ((s["name"], s["seconds"], s["status"], s["detail"]) for s in stages.values()),
    )
    if report["not_run"]:
        lines += ["", f"Not run: {', '.join(report['not_run'])}."]
    machine = stages.get("environment", {}).get("measured", {})
    if machine:
        lines += ["", "## Machine", "", *table(("what", "value"), machine.items())]
    for name, stage in stages.items():
        measured = stage["measured"]
        found = [*measured.get("warnings", ()), *measured.get("failed", ())]
        found += [f"{kernel}: {count}" for kernel, count in measured.get("kernels", {}).items()]
        if found:
            lines += ["", f"## Found by {name}", "", *(f"- `{item}`" for item in found)]
        if measured.get("rows"):
            lines += ["", f"## {name.capitalize()}", "", *benchmark_table(measured)]
        if stage["log_end"]:
            lines += ["", f"## End of the output of {name}", "", "```", stage["log_end"], "```"]
    return "\n".join(lines) + "\n"


def verdict(stages: Iterable[dict[str, Any]]) -> str:
    """Returns what failed, else what was skipped, else "ok"."""
    by_status: dict[str, list[str]] = {}
    for stage in stages:
        by_status.setdefault(stage["status"], []).append(stage["name"])
    if "FAILED" in by_status:
        return f"FAILED: {', '.join(by_status['FAILED'])}"
    if "skipped" in by_status:
        return f"no failure; skipped: {', '.join(by_status['skipped'])}"
    return "ok"


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table."""
    heads = list(heads)
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        cells = (re.sub(r"\s*\n\s*", "; ", "" if c is None else str(c)) for c in row)
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def benchmark_table(content: dict[str, Any]) -> Iterator[str]:
    """Yields the environment and the rows; ratios are of CUDA graphs where both were captured."""
    for name, value in content["environment"].items():
        yield f"- {name}: {value}"
    yield ""
    yield "Medians in ms: wall time of a call with synchronization, and replay of a CUDA graph."
    yield ""
    times = {key(row): row for row in content["rows"] if row["supported"]}
    heads = ("case", "batch", "dtype", "pass", "implementation", "layout", "wall", "graph")
    cells = []
    for row in content["rows"]:
        plain = times.get(key(row, rival="plain conv"))
        torchvision = times.get(key(row, rival="torchvision", layout="nchw"))
        cells.append(
            (
                *(row[name] for name in ("case", "batch", "dtype", "direction", "rival", "layout")),
                number(row["median_ms"], ".3f") if row["supported"] else "not supported",
                number(row["graph_ms"], ".3f"),
                number(ratio(row, plain), ".2f"),
                number(ratio(row, torchvision), ".2f"),
                number(row["workspace_mib"], ".1f"),
                number(row["difference"], ".0e"),
            )
        )
    yield from table((*heads, "/ plain", "/ torchvision", "MiB", "difference"), cells)


def key(row: dict[str, Any], **other: str) -> tuple:
    """Returns what identifies a row of the benchmark, or of another implementation's row."""
    names = ("case", "batch", "dtype", "threads", "direction", "rival", "layout")
    return tuple({**row, **other}[name] for name in names)


def ratio(row: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """Returns the ratio of the times of two rows."""
    if other is None or not row["supported"]:
        return None
    if row["graph_ms"] and other["graph_ms"]:
        return row["graph_ms"] / other["graph_ms"]
    return row["median_ms"] / other["median_ms"]


def number(value: float | None, form: str) -> str:
    """Formats a number; None is an empty cell."""
    return "" if value is None else f"{value:{form}}"
