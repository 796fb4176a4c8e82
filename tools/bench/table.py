# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Rows, their ratios, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .cases import OURS, PLAIN, TORCHVISION, Rival, Setting
from .machine import Peak
from .timing import Times

NAME_WIDTH, COLUMN_WIDTH = 52, 8
HEADS = (
    "least",
    "median",
    "spread",
    "x plain",
    "x tv",
    "x fp32",
    "GFLOP/s",
    "peak",
    "MiB",
    "graph",
)
LEGEND = """\
least, median    ms of a call; graph: ms of a replayed CUDA graph (median)
spread           distance of the quartiles in percent of the median
x plain, x tv    median in multiples of the plain convolution's in the same layout, of torchvision's
x fp32           median in multiples of the same rival's in float32
GFLOP/s, peak    of the convolution's products by the median, as a share of the GEMM peak above
MiB              memory at the peak beyond inputs, outputs and gradients"""


@dataclass(frozen=True)
class Row:
    """What was found of one rival; numbers are None where there are none, turns 0 if unsupported.

    Times are in milliseconds, `times_...` ratios of medians, `peak_share` a fraction.
    """

    kind: str
    case: str
    batch: int
    dtype: str
    threads: int
    rival: str
    layout: str
    direction: str
    supported: bool
    turns: int = 0
    least_ms: float | None = None
    median_ms: float | None = None
    spread_percent: float | None = None
    graph_ms: float | None = None
    times_plain: float | None = None
    times_torchvision: float | None = None
    times_float32: float | None = None
    gflops: float | None = None
    peak_share: float | None = None
    workspace_mib: float | None = None
    paper_times_plain: float | None = None

    @property
    def label(self) -> str:
        """Names direction, rival and layout."""
        layout = "" if self.layout == "nchw" else f", {self.layout}"
        return f"  {self.direction:<17}{self.rival}{layout}"


@dataclass(frozen=True)
class Context:
    """What the rows of one direction of one case have in common."""

    kind: str
    case: str
    direction: str
    setting: Setting
    flop: int | None = None
    peak: Peak | None = None
    paper_times_plain: float | None = None  # of the deformable net


def make_rows(
    context: Context,
    times: Mapping[Rival, Times | None],
    workspaces: Mapping[Rival, float | None],
    earlier: Iterable[Row],
) -> list[Row]:
    """Turns times into rows with their ratios.

    Args:
        context: what the rows share.
        times: of each rival; None: not supported.
        workspaces: MiB of each rival that is supported.
        earlier: rows from before, among them perhaps those of float32.
    """
    of_float32 = {key(row): row.median_ms for row in earlier if row.dtype == "float32"}
    rows = []
    for rival, measured in times.items():
        row = blank_row(context, rival, measured is not None)
        if measured is not None:
            numbers = numbers_of(context, rival, times, measured)
            float32 = of_float32.get(key(row))
            if float32 is not None:
                numbers["times_float32"] = measured.median / float32
            numbers["workspace_mib"] = workspaces.get(rival)
            row = Row(**{**vars(row), **numbers})
        rows.append(row)
    return rows


def blank_row(context: Context, rival: Rival, supported: bool) -> Row:
    """Returns a row without numbers."""
    setting = context.setting
    return Row(
        kind=context.kind,
        case=context.case,
        batch=setting.batch,
        dtype=setting.dtype,
        threads=setting.threads,
        rival=rival.name,
        layout=rival.layout,
        direction=context.direction,
        supported=supported,
    )


def numbers_of(
    context: Context, rival: Rival, times: Mapping[Rival, Times | None], measured: Times
) -> dict[str, float | int | None]:
    """Returns what follows from the times of one turn-taking group."""
    gflops = context.flop / measured.median / 1e6 if context.flop else None
    peak = context.peak.gflops if context.peak else None
    return {
        "turns": len(measured.wall),
        "least_ms": min(measured.wall),
        "median_ms": measured.median,
        "spread_percent": measured.spread,
        "graph_ms": measured.graph_median,
        "times_plain": ratio(measured, times.get(Rival(PLAIN, rival.layout))),
        "times_torchvision": ratio(measured, times.get(Rival(TORCHVISION))),
        "gflops": gflops,
        "peak_share": gflops / peak if gflops and peak else None,
        "paper_times_plain": context.paper_times_plain if rival.name == OURS else None,
    }


def ratio(measured: Times, other: Times | None) -> float | None:
    """Returns how many times the other's median a median is."""
    return None if other is None else measured.median / other.median


def key(row: Row) -> tuple:
    """Returns what a row has in common with that of another dtype."""
    return (row.case, row.batch, row.threads, row.rival, row.layout, row.direction)


def heads() -> str:
    """Returns the heads of the columns."""
    return " " * NAME_WIDTH + "".join(f"{head:>{COLUMN_WIDTH}}" for head in HEADS)


def title(case: str, setting: Setting) -> str:
    """Returns the line above a case's rows."""
    return f"{case}; batch {setting.batch}, {setting.dtype}, {counted(setting.threads)}"


def counted(threads: int) -> str:
    """Returns a number of threads in words."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def line(row: Row) -> str:
    """Returns a row as it is printed."""
    if not row.supported:
        return f"{row.label:<{NAME_WIDTH}} not supported"
    cells = (
        milliseconds(row.least_ms),
        milliseconds(row.median_ms),
        cell(row.spread_percent, ".1f", "%"),
        cell(row.times_plain, ".2f"),
        cell(row.times_torchvision, ".2f"),
        cell(row.times_float32, ".2f"),
        cell(row.gflops, ".0f"),
        cell(row.peak_share, ".0%"),
        cell(row.workspace_mib, ".1f"),
        milliseconds(row.graph_ms),
    )
    text = f"{row.label:<{NAME_WIDTH}}" + "".join(f"{c:>{COLUMN_WIDTH}}" for c in cells)
    if row.paper_times_plain is not None:
        text += f"   paper: {row.paper_times_plain:.3g} x plain"
    return text


def cell(value: float | None, form: str, unit: str = "") -> str:
    """Returns a number, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def milliseconds(value: float | None) -> str:
    """Returns a time with about four digits, so that it fits its column."""
    return cell(value, ".3f" if value is not None and value < 10 else ".1f")


def peak_line(peak: Peak) -> str:
    """Returns a measured peak as it is printed."""
    return f"{peak.dtype}, {counted(peak.threads)}: {peak.gflops:.0f} GFLOP/s, by {peak.by}"
