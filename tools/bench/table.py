# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Rows of the benchmark, their ratios, and how they are printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from .cases import ONNX_RUNTIME, OURS, PLAIN, TORCHVISION, Rival, Setting
from .machine import Peak
from .timing import Times

NAME_WIDTH, COLUMN_WIDTH, MEAN_WIDTH = 52, 8, 14
HEADS = (
    "min", "median", "spread", "x plain", "x tv", "x ort", "x fp32", "GFLOP/s", "peak", "MiB",
    "graph", "diff",
)  # fmt: skip
LEGEND = """\
min, median      ms per call; graph: ms per replay of a CUDA graph (median)
spread           interquartile range in percent of the median
x plain          median relative to the plain convolution in the same layout
x tv, x ort      median relative to torchvision, to ONNX Runtime
x fp32           median relative to the same implementation in float32
GFLOP/s, peak    of the GEMMs by the median, and relative to the GEMM peak above
MiB              peak memory beyond inputs, outputs and gradients
diff             largest relative difference of output and gradients from dcn_plugin's"""


@dataclass(frozen=True)
class Row:
    """The measurements of one implementation; numbers that do not apply are None.

    Times are in milliseconds, `times_...` are ratios of medians, `peak_share` is a fraction.
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
    min_ms: float | None = None
    median_ms: float | None = None
    spread_percent: float | None = None
    graph_ms: float | None = None
    times_plain: float | None = None
    times_torchvision: float | None = None
    times_onnx_runtime: float | None = None
    times_float32: float | None = None
    gflops: float | None = None
    peak_share: float | None = None
    workspace_mib: float | None = None
    difference: float | None = None
    paper_times_plain: float | None = None

    @property
    def label(self) -> str:
        """Returns direction, implementation and layout."""
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
    paper_times_plain: float | None = None  # of the deformable model
    differences: Mapping[Rival, float] = field(default_factory=dict)  # from ours


def make_rows(
    context: Context,
    times: Mapping[Rival, Times | None],
    workspaces: Mapping[Rival, float | None],
    earlier: Iterable[Row],
) -> list[Row]:
    """Turns times into rows with their ratios.

    Args:
        context: What the rows share.
        times: The times of each rival; None if it does not support the dtype.
        workspaces: MiB of each supported rival.
        earlier: Earlier rows, which may contain those of float32.
    """
    float32 = {key(row): row.median_ms for row in earlier if row.dtype == "float32"}
    setting, rows = context.setting, []
    for rival, measured in times.items():
        row = Row(
            kind=context.kind,
            case=context.case,
            batch=setting.batch,
            dtype=setting.dtype,
            threads=setting.threads,
            rival=rival.name,
            layout=rival.layout,
            direction=context.direction,
            supported=measured is not None,
        )
        if measured is not None:
            median = measured.median
            others = (Rival(PLAIN, rival.layout), Rival(TORCHVISION), Rival(ONNX_RUNTIME))
            plain, torchvision, onnx_runtime = (
                median / times[other].median if times.get(other) else None for other in others
            )
            gflops = context.flop / median / 1e6 if context.flop else None
            row = replace(
                row,
                turns=len(measured.wall),
                min_ms=min(measured.wall),
                median_ms=median,
                spread_percent=measured.spread,
                graph_ms=measured.graph_median,
                times_plain=plain,
                times_torchvision=torchvision,
                times_onnx_runtime=onnx_runtime,
                times_float32=median / float32[key(row)] if float32.get(key(row)) else None,
                gflops=gflops,
                peak_share=gflops / context.peak.gflops if gflops and context.peak else None,
                workspace_mib=workspaces.get(rival),
                difference=context.differences.get(rival),
                paper_times_plain=context.paper_times_plain if rival.name == OURS else None,
            )
        rows.append(row)
    return rows


def key(row: Row) -> tuple:
    """Returns what a row has in common with its rows of other dtypes."""
    return (row.case, row.batch, row.threads, row.rival, row.layout, row.direction)


@dataclass(frozen=True)
class GeometricMean:
    """Times of the others relative to ours, over all layers; None if one is not measured."""

    direction: str
    dtype: str
    threads: int
    layout: str
    layers: int
    plain: float | None
    torchvision: float | None
    onnx_runtime: float | None


def geometric_means(rows: Iterable[Row]) -> list[GeometricMean]:
    """Returns the means of each direction, dtype, number of threads and layout."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.kind == "conv" and row.rival == OURS:
            group = (row.direction, row.dtype, row.threads, row.layout)
            groups.setdefault(group, []).append(row)
    found = []
    for group, layers in groups.items():
        ratios = zip(
            *((r.times_plain, r.times_torchvision, r.times_onnx_runtime) for r in layers),
            strict=True,
        )
        means = (None if None in r else 1 / statistics.geometric_mean(r) for r in ratios)
        found.append(GeometricMean(*group, len(layers), *means))
    return found


def mean_lines(means: list[GeometricMean]) -> Iterator[str]:
    """Yields the lines of the table of geometric means."""
    if not means:
        return
    yield f"\nTimes relative to {OURS}'s, geometric means over the layers"
    columns = ("layers", PLAIN, TORCHVISION, ONNX_RUNTIME)
    yield " " * NAME_WIDTH + "".join(f"{column:>{MEAN_WIDTH}}" for column in columns)
    for mean in means:
        of = f"{mean.dtype}, {counted(mean.threads)}, {mean.layout}"
        ratios = (mean.plain, mean.torchvision, mean.onnx_runtime)
        cells = (str(mean.layers), *(cell(ratio, ".2f") for ratio in ratios))
        yield f"  {mean.direction:<17}{of}".ljust(NAME_WIDTH) + "".join(
            f"{c:>{MEAN_WIDTH}}" for c in cells
        )


def heads() -> str:
    """Returns the column headers."""
    return " " * NAME_WIDTH + "".join(f"{head:>{COLUMN_WIDTH}}" for head in HEADS)


def title(case: str, setting: Setting) -> str:
    """Returns the title above the rows of a case."""
    return f"{case}; batch {setting.batch}, {setting.dtype}, {counted(setting.threads)}"


def counted(threads: int) -> str:
    """Formats a number of threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def line(row: Row) -> str:
    """Formats a row."""
    if not row.supported:
        return f"{row.label:<{NAME_WIDTH}} not supported"
    cells = (
        milliseconds(row.min_ms),
        milliseconds(row.median_ms),
        cell(row.spread_percent, ".1f", "%"),
        cell(row.times_plain, ".2f"),
        cell(row.times_torchvision, ".2f"),
        cell(row.times_onnx_runtime, ".2f"),
        cell(row.times_float32, ".2f"),
        cell(row.gflops, ".0f"),
        cell(row.peak_share, ".0%"),
        cell(row.workspace_mib, ".1f"),
        milliseconds(row.graph_ms),
        cell(row.difference, ".0e"),
    )
    text = f"{row.label:<{NAME_WIDTH}}" + "".join(f"{c:>{COLUMN_WIDTH}}" for c in cells)
    if row.paper_times_plain is not None:
        text += f"   paper: {row.paper_times_plain:.3g} x plain"
    return text


def cell(value: float | None, form: str, unit: str = "") -> str:
    """Formats a number, or a dash for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def milliseconds(value: float | None) -> str:
    """Formats a time with about four digits, so that it fits its column."""
    return cell(value, ".3f" if value is not None and value < 10 else ".1f")


def peak_line(peak: Peak) -> str:
    """Formats a measured peak."""
    return f"{peak.dtype}, {counted(peak.threads)}: {peak.gflops:.0f} GFLOP/s, by {peak.by}"
