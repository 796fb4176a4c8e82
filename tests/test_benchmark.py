# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The benchmark: a quick run, its arithmetic, and that all implementations compute the same."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from types import SimpleNamespace

import benchmark
import pytest
import torch
import torchvision
from bench import agreement, cases, memory, nets, onnx_runtime, table, timing
from bench.cases import (
    DEFORMOPS,
    MMCV,
    NO_OFFSETS,
    ONNX_RUNTIME,
    OURS,
    PLAIN,
    TORCHVISION,
    Call,
    Rival,
    Setting,
)
from bench.machine import Peak
from bench.timing import Times
from torch.testing import assert_close

CPU = Setting("cpu", "float32", threads=1)
NUMBERS = ("min_ms", "median_ms", "spread_percent")
QUICK = cases.QUICK_CONV_CASES[0]
SMALL_LAYERS = [case.small() for case in cases.CONV_CASES]
needs_onnx_runtime = pytest.mark.skipif(
    not onnx_runtime.installed(), reason="ONNX Runtime 1.25 or later is not installed"
)


@pytest.fixture(scope="module")
def ask() -> Iterator[memory.Ask]:
    """The process that measures memory: one for all tests, since its start takes seconds."""
    with memory.cpu_process() as function:
        yield function


@pytest.fixture(scope="module")
def run(ask, tmp_path_factory) -> tuple[str, dict]:
    """What a quick run prints and writes."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    words = ["--quick", "--device", "cpu", "--threads", "1", "--seconds", "0.01", "--json"]
    threads, printed = torch.get_num_threads(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(memory, "cpu_process", lambda: nullcontext(ask))
        benchmark.main([*words, str(path)])
    torch.set_num_threads(threads)
    return printed.getvalue(), json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(run) -> list[table.Row]:
    return [table.Row(**row) for row in run[1]["rows"]]


class TestQuickRun:
    def test_every_kind_dtype_and_rival_has_its_rows(self, rows):
        def rivals(kind: str, dtype: str) -> set[str]:
            names = {r.rival for r in rows if r.kind == kind and r.dtype == dtype}
            return names - {MMCV}  # where it is installed

        pooled = {OURS, f"{OURS}, shared offsets", NO_OFFSETS, TORCHVISION}
        for dtype in ("float32", "bfloat16"):
            others = {ONNX_RUNTIME} if onnx_runtime.runs("cpu", dtype) else set()
            assert rivals("conv", dtype) == {OURS, TORCHVISION, PLAIN, *others}
            assert rivals("roi", dtype) == pooled
        if importlib.util.find_spec("detectron2") is not None:
            assert rivals("nets", "float32") == {OURS, PLAIN}
        for row in rows:
            both = (nets.INFERENCE, nets.TRAINING) if row.kind == "nets" else cases.DIRECTIONS
            assert row.direction in both
            partner = dataclasses.replace(row, direction=both[1 - both.index(row.direction)])
            found = [r for r in rows if identity(r) == identity(partner)]
            assert len(found) == (row.rival != ONNX_RUNTIME)  # which has no backward pass
            if row.rival == OURS and row.kind != "nets":
                layouts = {r.layout for r in rows if r.case == row.case and r.rival == OURS}
                assert layouts == {"nchw", "nhwc"}
        assert len({identity(row) for row in rows}) == len(rows)

    def test_supported_rows_have_times_and_the_others_say_so(self, run, rows):
        for row in rows:
            values = [getattr(row, name) for name in NUMBERS]
            if row.supported:
                assert timing.MIN_TURNS <= row.turns <= timing.MAX_TURNS
                assert 0 < row.min_ms <= row.median_ms
                assert row.spread_percent >= 0
            else:
                assert row.turns == 0
                assert values == [None] * 3
        unsupported = {(r.rival, r.dtype) for r in rows if not r.supported} - {(MMCV, "bfloat16")}
        assert unsupported == {(TORCHVISION, "bfloat16")}
        lines = [line for line in run[0].splitlines() if line.endswith("not supported")]
        assert len(lines) == sum(not row.supported for row in rows)

    def test_ratios_follow_from_the_times(self, run, rows):
        peaks = {(p["dtype"], p["threads"]): p["gflops"] for p in run[1]["gemm_peaks"]}
        flop = {d: QUICK.flop(QUICK.batch, direction=d) for d in cases.DIRECTIONS}
        by_identity = {identity(row): row for row in rows}

        def median(row: table.Row, **other: str) -> float | None:
            found = by_identity.get(identity(dataclasses.replace(row, **other)))
            return found.median_ms if found else None

        for row in (row for row in rows if row.supported):
            for ratio, other in (
                (row.times_plain, median(row, rival=PLAIN)),
                (row.times_torchvision, median(row, rival=TORCHVISION, layout="nchw")),
                (row.times_onnx_runtime, median(row, rival=ONNX_RUNTIME, layout="nchw")),
            ):
                assert ratio == (None if other is None else pytest.approx(row.median_ms / other))
            if row.dtype != "float32":
                fp32 = median(row, dtype="float32")
                assert row.times_float32 == pytest.approx(row.median_ms / fp32)
            if row.kind == "conv":
                gflops = flop[row.direction] / row.median_ms / 1e6
                assert row.gflops == pytest.approx(gflops)
                peak = peaks[row.dtype, row.threads]
                assert row.peak_share == pytest.approx(gflops / peak)
            if row.kind != "nets" and row.rival != ONNX_RUNTIME and memory.reset_peak():
                assert row.workspace_mib >= 0
            compared = row.rival in (TORCHVISION, ONNX_RUNTIME)
            assert (row.difference is not None and row.difference < 1e-4) == compared

    def test_the_means_follow_the_rows(self, run, rows):
        ours = [r for r in rows if r.kind == "conv" and r.rival == OURS]
        for mean, row in zip(run[1]["geometric_means"], ours, strict=True):  # of a single layer
            assert mean["layers"] == 1
            assert mean["plain"] == pytest.approx(1 / row.times_plain)
        end = run[0].splitlines()[-len(ours) :]
        assert [line.split()[0] for line in end] == [row.direction for row in ours]

    def test_the_header_describes_the_environment(self, run):
        printed, written = run
        assert {"PyTorch", "Rivals", "CPU", "Threads", "Commit"} <= set(written["environment"])
        for value in written["environment"].values():
            assert value in printed
        assert "float32, 1 thread: " in printed


TIMES = {
    Rival(OURS): Times([5.0, 3.0, 4.0, 100.0, 2.0], graph=[1.0, 3.0, 2.0]),
    Rival(OURS, "nhwc"): Times([6.0, 6.0, 6.0]),
    Rival(PLAIN): Times([2.0, 2.0, 2.0]),
    Rival(PLAIN, "nhwc"): Times([3.0, 3.0, 3.0]),
    Rival(TORCHVISION): None,
}


class TestArithmetic:
    def test_flop(self):
        res5, birefnet = cases.CONV_CASES[0], cases.CONV_CASES[3]
        assert res5.flop(1, "forward") == 2 * 38 * 63 * 512 * (9 * 512)  # 11.3 GFLOP
        assert res5.flop(8, "forward+backward") == 3 * 8 * res5.flop(1, "forward")
        assert birefnet.flop(1, "forward") == 2 * 64 * 64 * 256 * (49 * 64)

    def test_names_of_layers(self):
        names = [case.name for case in cases.CONV_CASES]
        assert names[0] == "res5: 512 x 38 x 63 -> 512, 3 x 3, dilation 2"
        assert names[6] == "EDVR: 64 x 180 x 320 -> 64, 3 x 3, 8 offset groups, mask"
        assert len(set(names)) == len(names)

    def test_statistics_and_ratios(self):
        peak = Peak("float32", 1, 10.0, "torch.mm")
        context = table.Context("conv", "a case", "forward", CPU, flop=20_000_000, peak=peak)
        ours, nhwc, *_, theirs = table.make_rows(context, TIMES, {Rival(OURS): 7.0}, [])
        assert (ours.turns, ours.min_ms, ours.median_ms, ours.graph_ms) == (5, 2.0, 4.0, 2.0)
        assert ours.spread_percent == pytest.approx(50)  # quartiles 3 and 5
        assert (ours.times_plain, ours.times_torchvision) == (2.0, None)
        assert (ours.gflops, ours.peak_share) == pytest.approx((5.0, 0.5))
        assert (ours.workspace_mib, nhwc.workspace_mib) == (7.0, None)
        assert nhwc.times_plain == 2.0  # of the plain convolution in the same layout
        assert "not supported" in table.line(theirs)

    def test_geometric_means(self):
        def rows(case: str, ours: float, torchvision: float | None) -> list[table.Row]:
            times = {
                Rival(OURS): Times([ours] * 3),
                Rival(OURS, "nhwc"): Times([1.0] * 3),
                Rival(ONNX_RUNTIME): Times([6.0] * 3),
                Rival(TORCHVISION): torchvision and Times([torchvision] * 3),
            }
            return table.make_rows(table.Context("conv", case, "forward", CPU), times, {}, [])

        found = table.geometric_means([*rows("a", 2.0, 8.0), *rows("b", 6.0, 6.0)])
        assert [(mean.layout, mean.layers) for mean in found] == [("nchw", 2), ("nhwc", 2)]
        assert [mean.torchvision for mean in found] == pytest.approx([2.0, 48**0.5])
        assert [mean.onnx_runtime for mean in found] == pytest.approx([3**0.5, 6.0])
        assert found[0].plain is None
        # A mean over the other layers could not be compared with the others.
        partial = table.geometric_means([*rows("a", 2.0, 8.0), *rows("b", 6.0, None)])
        assert (partial[0].layers, partial[0].torchvision) == (2, None)
        assert table.geometric_means([]) == list(table.mean_lines([])) == []

    def test_dtypes_are_compared_with_the_float32_of_the_same_rival(self):
        def rows(dtype: str, times: dict, earlier: list[table.Row]) -> list[table.Row]:
            setting = dataclasses.replace(CPU, dtype=dtype)
            context = table.Context("conv", "a case", "forward", setting)
            return table.make_rows(context, times, {}, earlier)

        earlier = rows(
            "float32", {Rival(OURS): Times([8.0] * 3), Rival(PLAIN): Times([5.0] * 3)}, []
        )
        half = rows("bfloat16", {Rival(OURS): Times([2.0] * 3)}, earlier)
        assert half[0].times_float32 == 0.25


class TestMeasure:
    def test_functions_take_turns_after_a_warm_up(self):
        called = []
        functions = {name: lambda name=name: called.append(name) for name in "ab"}
        times = timing.measure(functions, "cpu", seconds=0.0, least=3, most=15)
        assert called == list("ab" + 3 * "aabb")  # the second call is timed
        assert [len(t.wall) for t in times.values()] == [3, 3]
        times = timing.measure(functions, "cpu", seconds=60.0, least=3, most=5)
        assert [len(t.wall) for t in times.values()] == [5, 5]

    def test_a_function_in_another_process_times_itself(self):
        times = timing.measure({"a": timing.SelfTimed(lambda: 5.0)}, "cpu", seconds=0.0)
        assert times["a"].wall == [5.0] * timing.MIN_TURNS

    def test_a_dtype_that_is_not_implemented_is_not_an_error(self):
        def fails() -> None:
            raise NotImplementedError("\"some_kernel\" not implemented for 'BFloat16'")

        times = timing.measure({"a": fails, "b": lambda: None}, "cpu", seconds=0.0)
        assert times["a"] is None
        assert len(times["b"].wall) == timing.MIN_TURNS

    @pytest.mark.parametrize(
        "error", [RuntimeError("out of memory"), NotImplementedError("no kernel"), ValueError("x")]
    )
    def test_any_other_error_is_raised(self, error):
        def fails() -> None:
            raise error

        with pytest.raises(type(error), match=str(error)):
            timing.measure({"a": fails}, "cpu", seconds=0.0)


class TestAgreement:
    @pytest.fixture
    def calls(self) -> dict[Rival, Call]:
        return QUICK.rivals(CPU)

    def replaced(self, calls: dict, function: Callable) -> dict[Rival, Call]:
        """Replaces the function of torchvision."""
        rival = Rival(TORCHVISION)
        return {**calls, rival: dataclasses.replace(calls[rival], function=function)}

    @pytest.mark.parametrize("case", [*SMALL_LAYERS, *cases.QUICK_ROI_CASES], ids=lambda c: c.name)
    def test_the_others_agree(self, case):
        setting = dataclasses.replace(CPU, batch=case.batch)
        differences, problems = agreement.compare(case.rivals(setting), case.name, setting)
        assert not problems
        others = {TORCHVISION}
        if case.kind == "conv" and onnx_runtime.installed():
            others.add(ONNX_RUNTIME)
        assert {rival.name for rival in differences} - {MMCV} == others
        assert all(0 <= difference < 1e-5 for difference in differences.values())

    def test_results_that_differ_are_reported(self, calls):
        theirs = calls[Rival(TORCHVISION)].function
        wrong = self.replaced(calls, lambda *args: 1.1 * theirs(*args))
        differences, (problem,) = agreement.compare(wrong, "a case", CPU)
        assert problem.differs
        assert differences[Rival(TORCHVISION)] == pytest.approx(0.1, rel=1e-3)
        assert problem.line == (
            "torchvision, nchw: differs from dcn_plugin by 1.0e-01 "
            "(a case; batch 1, float32, 1 thread)"
        )
        nan = self.replaced(calls, lambda *args: theirs(*args) * float("nan"))
        assert agreement.compare(nan, "a case", CPU)[1][0].differs

    def test_a_rival_that_fails_is_reported(self, calls):
        def fails(*args: object) -> None:
            raise OSError("no compiler\nfor Triton")

        differences, (problem,) = agreement.compare(self.replaced(calls, fails), "a case", CPU)
        assert not problem.differs
        assert Rival(TORCHVISION) not in differences
        assert "torchvision, nchw: OSError: no compiler (a case" in problem.line

    def test_an_unsupported_dtype_is_no_problem(self):
        setting = dataclasses.replace(CPU, dtype="bfloat16")
        calls = QUICK.rivals(setting)
        assert agreement.compare(calls, "a case", setting) == ({}, [])

    def test_our_own_errors_are_raised(self, calls):
        rival = Rival(OURS)
        calls[rival] = dataclasses.replace(calls[rival], args=())
        with pytest.raises(TypeError):
            agreement.compare(calls, "a case", CPU)

    def test_a_rival_with_a_problem_is_not_timed(self, monkeypatch, capsys, tmp_path, ask):
        problem = agreement.Problem(Rival(TORCHVISION), True, "torchvision differs")
        monkeypatch.setattr(agreement, "compare", lambda *_: ({}, [problem]))
        monkeypatch.setattr(memory, "cpu_process", lambda: nullcontext(ask))
        monkeypatch.setattr(onnx_runtime, "installed", lambda: False)
        options = "--quick --device cpu --only conv --dtypes float32 --threads 1 --seconds 0"
        path = tmp_path / "results.json"
        with pytest.raises(SystemExit, match="results differ"):
            benchmark.main([*options.split(), "--without", PLAIN, "--json", str(path)])
        content = json.loads(path.read_text())
        assert {row["rival"] for row in content["rows"]} == {OURS}
        assert content["problems"] == ["torchvision differs"]
        printed = capsys.readouterr()
        assert "  torchvision differs; not timed" in printed.out
        assert printed.err.startswith("ONNX Runtime 1.25 or later is not installed")


class TestOnnxRuntime:
    @needs_onnx_runtime
    def test_an_error_in_its_process_is_reported(self):
        calls = QUICK.rivals(CPU)
        call = calls[Rival(ONNX_RUNTIME)]
        calls[Rival(ONNX_RUNTIME)] = dataclasses.replace(call, args=(*call.args[:-1], call.args[0]))
        _, (problem,) = agreement.compare(calls, "a case", CPU)
        assert not problem.differs
        assert problem.line.startswith("ONNX Runtime, nchw: ")
        assert call.timed("forward")() > 0  # the process goes on

    def test_it_is_for_float32_on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(onnx_runtime, "installed", lambda: True)
        assert onnx_runtime.runs("cpu", "float32")
        assert not onnx_runtime.runs("cpu", "bfloat16")
        assert not onnx_runtime.runs("cuda", "float32")


class TestDeformops:
    @pytest.fixture
    def functions(self, monkeypatch) -> Iterator[dict[str, Callable]]:
        """The functions for both layouts, with modules that compute by torchvision."""

        def native(value, offset, weight, bias, mask, *geometry, offset_groups):
            for tensor in filter(torch.is_tensor, (value, offset, mask)):
                assert tensor.is_contiguous()
            assert offset.shape[3:] == (offset_groups, 9, 2)
            assert mask is None or mask.shape[3:] == (offset_groups, 9)
            taps = offset.flatten(3).permute(0, 3, 1, 2)
            mask = None if mask is None else mask.flatten(3).permute(0, 3, 1, 2)
            output = theirs(value.permute(0, 3, 1, 2), taps, weight, bias, *geometry, mask)
            return output.permute(0, 2, 3, 1)

        theirs = torchvision.ops.deform_conv2d
        modules = {
            "deformops": {},
            "deformops.integrations": {},
            "deformops.integrations.torchvision": {"deform_conv2d": theirs},
            "deformops.registry": {"conv": native},
        }
        for name, attributes in modules.items():
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**attributes))
        cases.deformops_conv2d.cache_clear()
        yield {layout: cases.deformops_conv2d(layout) for layout in cases.LAYOUTS}
        cases.deformops_conv2d.cache_clear()

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("layout", cases.LAYOUTS)
    def test_arguments_are_those_of_its_public_functions(self, functions, layout, masked):
        input = CPU.randn(2, 4, 5, 6, layout=layout)
        offset = CPU.randn(2, 36, 5, 6, layout=layout)
        weight = CPU.randn(3, 4, 3, 3, layout=layout)
        mask = CPU.randn(2, 18, 5, 6, layout=layout) if masked else None
        args = (input, offset, weight, None, 1, 2, 2, mask)
        assert_close(functions[layout](*args), torchvision.ops.deform_conv2d(*args))

    def test_it_is_a_rival_on_gpus_only(self, functions):
        assert Rival(DEFORMOPS) not in QUICK.rivals(CPU)


def test_mmcv_has_a_function_without_and_one_with_mask(monkeypatch):
    def v1(input, offset, weight, stride, padding, dilation, groups, offset_groups):
        assert (groups, offset_groups) == (1, 2)
        return theirs(input, offset, weight, None, stride, padding, dilation)

    def v2(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
        assert (groups, offset_groups) == (1, 2)
        return theirs(input, offset, weight, bias, stride, padding, dilation, mask)

    theirs = torchvision.ops.deform_conv2d
    ops = SimpleNamespace(deform_conv2d=v1, modulated_deform_conv2d=v2)
    monkeypatch.setitem(sys.modules, "mmcv", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "mmcv.ops", ops)
    function = cases.mmcv_deform_conv2d.__wrapped__()
    for case in (QUICK, dataclasses.replace(QUICK, mask=False)):
        args = case.rivals(CPU)[Rival(TORCHVISION)].args
        assert_close(function(*args), theirs(*args))


class TestRivals:
    @pytest.mark.parametrize("case", cases.QUICK_ROI_CASES, ids=lambda case: case.name)
    @pytest.mark.parametrize("direction", cases.DIRECTIONS)
    def test_poolings_equal_torchvision(self, case, direction):
        calls = case.rivals(CPU)
        ours = calls[Rival(NO_OFFSETS)].run(direction)
        assert_close(ours, calls[Rival(TORCHVISION)].run(direction))

    @pytest.mark.parametrize("direction", cases.DIRECTIONS)
    def test_convolutions_equal_torchvision(self, direction):
        calls = QUICK.rivals(CPU)
        ours, theirs = calls[Rival(OURS)], calls[Rival(TORCHVISION)]
        # output; input, offset, weight and mask
        assert len(ours.run("forward+backward")) == 5
        assert_close(ours.run(direction), theirs.run(direction), rtol=1e-4, atol=1e-4)

    def test_zero_offsets_equal_the_plain_convolution(self):
        calls = QUICK.rivals(CPU)
        ours, plain = calls[Rival(OURS)], calls[Rival(PLAIN)]
        with torch.no_grad():
            ours.args[1].zero_()
            ours.args[-1].fill_(1)  # mask
        assert_close(ours.run("forward"), plain.run("forward"), rtol=1e-4, atol=1e-4)

    def test_boxes_lie_on_the_image(self):
        boxes = cases.ROI_CASES[0].boxes(torch.float32)[:, 1:]
        size = boxes[:, 2:] - boxes[:, :2]
        assert boxes.min() >= 0
        assert (boxes[:, 2:] <= torch.tensor([63 * 16, 38 * 16])).all()
        assert size.min() >= 31.9
        assert size.max() <= 400.1


@pytest.mark.skipif(not memory.reset_peak(), reason="the kernel cannot reset the peak")
def test_workspace_on_the_cpu_is_the_im2col_buffer_of_torchvision(ask):
    case = cases.ConvCase("many channels, small map", 64, 60, 70, 64)
    im2col = 9 * 64 * 60 * 70 * 4 / memory.MIB
    found = ask(case, CPU, Rival(TORCHVISION), "forward")
    assert im2col <= found < 2 * im2col


class TestCommandLine:
    def plan(self, *arguments: str) -> list[tuple[str, Setting]]:
        options = benchmark.parse(["--device", "cpu", *arguments])
        return [(case.kind, setting) for case, setting in benchmark.plan(options)]

    def test_options_choose_the_cases(self):
        options = ("--threads", "1", "2", "--dtypes", "bfloat16", "float32", "--batches", "8")
        jobs = self.plan(*options, "--skip", "roi")
        settings = [setting for kind, setting in jobs if kind == "conv"]
        assert len(settings) == len(cases.CONV_CASES) * 2 * 2
        assert {s.batch for s in settings} == {8}
        # float32 first: the others are compared with it.
        assert [s.dtype for s in settings[:2]] == ["float32", "bfloat16"]
        assert {kind for kind, _ in jobs} == {"conv", "nets"}
        assert all(s.dtype == "float32" for kind, s in jobs if kind == "nets")

    def test_default_cases(self):
        jobs = self.plan("--threads", "1")
        convolutions = [setting for kind, setting in jobs if kind == "conv"]
        assert len(convolutions) == 9 * 2  # layers, dtypes
        assert {s.dtype for s in convolutions} == {"float32", "bfloat16"}
        assert [s.batch for s in convolutions] == [1] * 16 + [4] * 2

    def test_pooling_has_no_tf32(self, monkeypatch):
        monkeypatch.setattr(benchmark, "check_device", lambda options: None)
        options = benchmark.parse(["--device", "cuda"])
        dtypes = {(case.kind, setting.dtype) for case, setting in benchmark.plan(options)}
        assert ("conv", "tf32") in dtypes
        assert ("roi", "tf32") not in dtypes

    @pytest.mark.parametrize(
        "arguments",
        [["--dtypes", "int8"], ["--only", "all"], ["--threads", "0"], ["--seconds", "nan"]],
    )
    def test_unknown_values_are_errors(self, arguments, capsys):
        with pytest.raises(SystemExit) as error:
            benchmark.parse(arguments)
        assert error.value.code == 2
        assert arguments[1] in capsys.readouterr().err

    def test_what_the_machine_lacks_is_a_one_line_error(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match=r"^benchmark: --device cuda: PyTorch finds no GPU$"):
            benchmark.parse(["--device", "cuda"])
        with pytest.raises(SystemExit, match="only GPUs support it"):
            benchmark.parse(["--device", "cpu", "--dtypes", "tf32"])


def identity(row: table.Row) -> tuple:
    """Returns what identifies a row."""
    return (row.kind, *table.key(row), row.dtype)
