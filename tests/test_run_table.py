# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""run_table.py: which configs run, which are skipped, and the tables."""

from __future__ import annotations

import argparse
import csv
import fcntl
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_table
from table import report, runs
from table.paper import Cell, cells_of
from table.runs import Run, plan_runs

# Stands in for train_net.py: records the call and writes metrics and results.
PROGRAM = """
import json, os, pathlib, sys
words = sys.argv[1:]
config = pathlib.Path(words[words.index("--config-file") + 1]).stem
folder = pathlib.Path(words[words.index("OUTPUT_DIR") + 1])
seed = int(words[words.index("SEED") + 1])
with (folder / "calls.txt").open("a") as file:
    file.write(" ".join(words) + "\\n")
with (folder / "metrics.json").open("a") as file:
    file.write('{"iteration": 19, "eta_seconds": 3700}\\n')
if os.environ.get("FAIL", "none") in config:
    sys.exit("train_net: it failed")
(folder / "model_final.pth").touch()
bbox = {"AP50": 70.0 + seed, "AP70": 50.0, "AP50-cat": 1.0}
results = {"sem_seg": {"mIoU": 60.0}} if "deeplab" in config else {"bbox": bbox}
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture(autouse=True)
def _train_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    original = Run.command
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(
        Run, "command", lambda run: [sys.executable, "-S", str(program), *original(run)[2:]]
    )


def arguments(output: Path) -> argparse.Namespace:
    return run_table.parse_arguments(["--table", "1", "--output", str(output)])


def call(output: Path, *words: str) -> list[dict[str, str]]:
    """Runs the program; returns the table."""
    run_table.main(["--output", str(output), *words])
    (path,) = output.glob("table*.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def lines_of(output: Path, config: str) -> list[str]:
    (path,) = output.glob(f"{config}/seed_1/calls.txt")
    return path.read_text().splitlines()


def calls(output: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in output.rglob("calls.txt"))


def test_writes_the_papers_table_with_ours_beside_it(tmp_path: Path, capsys) -> None:
    rows = call(tmp_path / "out", "--table", "3", "--only", "*rfcn*", "--seeds", "2")
    assert [row["config"] for row in rows[::2]] == [
        f"VOC-Detection/rfcn_R_101_{difference}"
        for difference in (
            "plain",
            "atrous4",
            "atrous6",
            "atrous8",
            "dconv3",
            "droi",
            "dconv3_droi",
        )
    ]
    assert rows[0]["metric"] == "bbox/AP50" and rows[0]["paper"] == "80"
    assert rows[0]["ours"] == "71.5" and rows[0]["seeds"] == "2" and rows[0]["state"] == "run"
    assert float(rows[0]["spread"]) == pytest.approx(0.5**0.5, rel=1e-3)
    text = (tmp_path / "out/table_3.md").read_text()
    assert (
        "| R-FCN | 3 deformable convolutions and RoI pooling | AP50 / AP70 | 82.6 / 68.5 |  "
        "| 71.5 ± 0.7 / 50.0 ± 0.0 |" in text
    )
    assert "0 of 14 runs failed" in capsys.readouterr().out


def test_resumes_where_it_stopped(tmp_path: Path) -> None:
    words = ("--table", "1", "--only", "*/deeplab*dconv*")
    call(tmp_path / "out", *words)
    assert calls(tmp_path / "out") == 8
    (done,) = (tmp_path / "out").glob("VOC*/*dconv2/seed_1/results.json")
    done.unlink()
    call(tmp_path / "out", *words)
    assert calls(tmp_path / "out") == 9
    assert all("--resume" in line for line in lines_of(tmp_path / "out", "VOC*/*dconv2"))
    metrics = done.with_name("metrics.json")
    assert len(metrics.read_text().splitlines()) == 2
    call(tmp_path / "out", *words, "--again")
    assert calls(tmp_path / "out") == 17
    assert len(metrics.read_text().splitlines()) == 1
    assert "--resume" not in lines_of(tmp_path / "out", "VOC*/*dconv2")[-1]


def test_a_failed_run_is_reported_and_the_others_run(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FAIL", "dconv2")
    words = ["--table", "1", "--only", "*/ca_rpn*"]
    with pytest.raises(SystemExit) as caught:
        call(tmp_path / "out", *words)
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "ca_rpn_R_101_dconv2, seed 1 failed: exit 1: train_net: it failed" in printed.err
    assert "failed: exit 1: train_net: it failed |" in printed.out
    assert printed.out.count("71.0 / 50.0") == 4
    monkeypatch.delenv("FAIL")
    call(tmp_path / "out", *words)  # repeated, successfully
    assert calls(tmp_path / "out") == 6


def test_report_runs_nothing(tmp_path: Path, capsys) -> None:
    rows = call(tmp_path / "out", "--table", "5", "--report")
    assert {row["state"] for row in rows} == {"not run"} and len(rows) == 14 * 5
    assert calls(tmp_path / "out") == 0
    assert "| 34.5 / 55.0 / 14.0 / 37.7 / 50.3 | 35.7 / 56.8" in capsys.readouterr().out


def test_evaluation_comes_after_the_training_of_its_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        call(tmp_path / "out", "--table", "5", "--only", "*rfcn_AIR_plain_ms*")
    text = (tmp_path / "out/table_5.md").read_text()
    assert "failed: there are no weights" in text and calls(tmp_path / "out") == 0
    call(tmp_path / "out", "--table", "5", "--only", "*rfcn_AIR_plain*")
    (path,) = (tmp_path / "out").glob("*/*_ms_avg/seed_1/calls.txt")
    words = path.read_text().split()
    assert "--eval-only" in words and "--resume" not in words
    assert words[-1].endswith("rfcn_AIR_plain/seed_1/model_final.pth")


def test_weights_of_another_folder_are_evaluated(tmp_path: Path) -> None:
    weights = tmp_path / "weights/VOC-Detection/rfcn_R_101_plain.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    words = ["--weights", str(tmp_path / "weights"), "--table", "1", "--only"]
    call(tmp_path / "out", *words, "*rfcn*plain")
    (path,) = (tmp_path / "out").rglob("calls.txt")
    assert path.read_text().split()[-2:] == ["MODEL.WEIGHTS", str(weights)]


def test_any_configs_make_a_table(tmp_path: Path, monkeypatch, pytestconfig) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)
    rows = call(tmp_path / "out", "--configs", "configs/VOC-Detection/*_droi.yaml")
    assert [row["row"] for row in rows[::2]] == [
        f"{network}_R_101_{difference}"
        for network in ("faster_rcnn", "rfcn")
        for difference in ("dconv3_droi", "droi")
    ]
    assert rows[0]["metric"] == "bbox/AP50" and rows[0]["paper"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "1", "--only", "*nothing*"], "no config in table 1 matches"),
        (["--configs", "nowhere/*.yaml"], r"no config in nowhere/\*\.yaml"),
        (["--configs", str(Path(__file__).with_name("*.py"))], "must be files below .*configs"),
        (["--table", "1", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line_errors(words, message, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"run_table: .*{message}"):
        run_table.main(["--output", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_progress(tmp_path: Path) -> None:
    assert runs.progress(tmp_path) == "starting"
    (tmp_path / "metrics.json").write_text('{"iteration": 19, "eta_seconds": 3700.2}\n')
    assert runs.progress(tmp_path) == "iteration 19, 1 h 02 min left"
    # A line that is still being written, or that was truncated.
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 39, "los')
    assert runs.progress(tmp_path) == "iteration 19, 1 h 02 min left"
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 59}\n')
    assert runs.progress(tmp_path) == "iteration 19, 1 h 02 min left"
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"iteration": 79}\n')
    assert runs.progress(tmp_path) == "iteration 79"
    (tmp_path / "metrics.json").write_text("")
    assert runs.progress(tmp_path) == "starting"


def test_results_with_other_keys_are_refused(tmp_path: Path) -> None:
    words = ["--table", "1", "--only", "*/ca_rpn*plain"]
    call(tmp_path / "out", *words, "SOLVER.MAX_ITER", "5")
    with pytest.raises(
        SystemExit, match=r"was run with SOLVER\.MAX_ITER 5 at the end of the command"
    ):
        call(tmp_path / "out", *words)
    assert call(tmp_path / "out", *words, "--again")[0]["state"] == "run"


def test_damaged_results_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "VOC-Detection/ca_rpn_R_101_plain/seed_1"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"bbox"')
    with pytest.raises(SystemExit, match=r"run_table: .*seed_1/results\.json must be in JSON, got"):
        call(tmp_path, "--table", "1", "--report")


def test_a_run_in_progress_is_not_started_twice(tmp_path: Path, capsys) -> None:
    words = ["--table", "1", "--only", "*/ca_rpn*plain"]
    folder = tmp_path / "out/VOC-Detection/ca_rpn_R_101_plain/seed_1"
    folder.mkdir(parents=True)
    with (folder / "stdout.txt").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            call(tmp_path / "out", *words)
    assert "failed: another process runs it" in capsys.readouterr().err
    assert calls(tmp_path / "out") == 0


def test_termination_while_a_process_starts_ends_it(tmp_path: Path, monkeypatch) -> None:
    processes = []

    class Popen(subprocess.Popen):
        def _execute_child(self, *args, **kwargs) -> None:
            super()._execute_child(*args, **kwargs)
            processes.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with (
            (tmp_path / runs.OUTPUT).open("w") as output,
            pytest.raises(SystemExit, match="terminated"),
        ):
            runs.watch(["sleep", "60"], tmp_path, output, lambda _: None)
    finally:
        signal.signal(signal.SIGTERM, previous)
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


def test_an_evaluation_without_metrics_counts_as_finished() -> None:
    cell = Cell("row", "column", "COCO-Detection/x", ("bbox/AP",), (30.0,))
    (entry,) = report.collect([cell], {cell.config: [{}]}, {})
    assert str(entry) == "no metrics"


def test_a_config_of_two_tables_is_run_once(tmp_path: Path) -> None:
    cells = cells_of("1") + cells_of("3")
    planned = plan_runs(arguments(tmp_path), cells)
    assert len(planned) == len({run.folder for run in planned}) == len({c.config for c in cells})


def test_reads_the_results_of_train_net(tmp_path: Path) -> None:
    run = Run(arguments(tmp_path), Cell("row", "column", "a/b", ()), 3)
    assert run.results() is None
    run.folder.mkdir(parents=True)
    (run.folder / "results.json").write_text('{"bbox": {"AP50": 3.5, "APs": null}}')
    results = report.flatten(run.results())
    assert results.pop("bbox/AP50") == 3.5 and math.isnan(results.pop("bbox/APs")) and not results
