# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""learning_curves.py on small metrics.json files."""

from __future__ import annotations

import json
from pathlib import Path

import learning_curves
import pytest
from matplotlib.figure import Figure


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two configs with two seeds each; the last evaluation of a seed is repeated."""
    for config, best in (("plain", 40.0), ("dconv3", 50.0)):
        for seed in (1, 2):
            folder = tmp_path / config / f"seed_{seed}"
            folder.mkdir(parents=True)
            rows = [{"iteration": i, "total_loss": 1 / (1 + i)} for i in (19, 39, 59)]
            rows += [{"iteration": 29, "bbox/AP50": best / 2 + seed}]
            rows += [{"iteration": 59, "bbox/AP50": best + seed}] * (2 - (seed > 1))
            # The last line is incomplete.
            text = "".join(f"{json.dumps(row)}\n" for row in rows) + '{"iterat'
            (folder / "metrics.json").write_text(text)
    return [tmp_path / "plain", tmp_path / "dconv3"]


def test_reads_the_values_of_each_seed(runs: list[Path]) -> None:
    curves = learning_curves.read_curves(runs[0], "bbox/AP50")
    assert curves == [{30: 21.0, 60: 41.0}, {30: 22.0, 60: 42.0}]


def test_plots_all_configs(runs: list[Path], tmp_path: Path, capsys) -> None:
    output = tmp_path / "pictures/curves.png"
    words = [f"--runs={folder}" for folder in runs]
    metrics = ["--metric=bbox/AP50", "--metric=total_loss"]
    learning_curves.main([*words, *metrics, f"--output={output}"])
    assert output.read_bytes().startswith(b"\x89PNG")
    assert "bbox/AP50, total_loss of 2 configs" in capsys.readouterr().out


def test_plots_the_mean_and_the_range() -> None:
    axis = Figure().subplots()
    learning_curves.plot(axis, "plain", [{30: 20.0, 60: 40.0}, {30: 24.0, 60: 41.0, 90: 50.0}])
    assert axis.lines[0].get_xydata().tolist() == [[30, 22], [60, 40.5]]
    assert axis.lines[0].get_label() == "plain (2 seeds)"
    corners = axis.collections[0].get_paths()[0].vertices
    assert {tuple(corner) for corner in corners} == {(30, 20), (30, 24), (60, 40), (60, 41)}


def test_truncated_lines_are_skipped(runs: list[Path]) -> None:
    with (runs[0] / "seed_1/metrics.json").open("a") as file:
        file.write('{"iteration": 79}\n{"iteration": 89, "bbox/AP50": 45}\n')
    curves = learning_curves.read_curves(runs[0], "bbox/AP50")
    assert curves[0] == {30: 21.0, 60: 41.0, 90: 45}


def test_seeds_without_a_common_iteration_are_an_error(runs: list[Path]) -> None:
    row = json.dumps({"iteration": 44, "bbox/AP50": 1.0})
    (runs[0] / "seed_2/metrics.json").write_text(f"{row}\n")
    with pytest.raises(ValueError, match=r"plain have bbox/AP50 at no common iteration"):
        learning_curves.read_curves(runs[0], "bbox/AP50")


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("plain", r"--metric must be one of .*plain, got bbox/AP5; it has bbox/AP50, iteration"),
        ("none", r"--runs must be a folder with seed_\*/metrics.json, got .*none$"),
    ],
)
def test_what_is_missing_is_named(runs: list[Path], folder: str, message: str) -> None:
    words = ["--runs", str(runs[0].parent / folder), "--metric", "bbox/AP5", "--output", "x.png"]
    with pytest.raises(SystemExit, match=f"learning_curves: {message}"):
        learning_curves.main(words)


@pytest.mark.parametrize("row", [{"iteration": "a", "x": 3}, {"iteration": 1, "x": []}, {"x": 1}])
def test_rows_of_other_types_are_an_error(row: dict, tmp_path: Path) -> None:
    (tmp_path / "seed_1").mkdir()
    other_lines = b"\x89\xff\n[1]\n5\n"  # are skipped
    file = tmp_path / "seed_1/metrics.json"
    file.write_bytes(other_lines + json.dumps(row).encode() + b"\n")
    words = ["--runs", str(tmp_path), "--metric", "x", "--output", "x.png"]
    with pytest.raises(SystemExit, match=r"learning_curves: .*metrics\.json must have rows"):
        learning_curves.main(words)
