# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The page embeds what `trace` gives, stays small, and draws it in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcn_plugin.analysis import Recording, html_page, position_at, record, trace
from dcn_plugin.analysis.effective_dilation import dilation_map
from dcn_plugin.analysis.html_page import MAX_BYTES, PageObject, save_page
from dcn_plugin.layers import DeformConv2dPack

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(NAMES)}")
HEIGHT, WIDTH = 48, 80


def recorded(height: int, width: int, layers: int, groups: int, std: float = 0.3) -> Recording:
    """Records modulated layers at stride 4, of which the last has stride 2."""
    torch.manual_seed(3)
    strides = [1] * (layers - 1) + [2]
    settings = {"padding": 1, "offset_groups": groups, "modulated": True}
    packs = [DeformConv2dPack(4, 4, 3, stride=stride, **settings) for stride in strides]
    for pack in packs:
        nn.init.normal_(pack.offset_conv.weight, std=std)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), *packs)
    with record(model) as found, torch.no_grad():
        model(torch.rand(1, 3, height, width))
    return found


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded(HEIGHT, WIDTH, layers=3, groups=2)


def write(
    recording: Recording, path: Path, objects: list[PageObject], title: str = "a title"
) -> Path:
    height, width = recording.image_size
    image = np.random.default_rng(0).integers(0, 255, (2 * height, 2 * width, 3), np.uint8)
    save_page(path, title, image, recording, (height, width), objects)
    return path


def embedded(path: Path) -> dict[str, Any]:
    """Returns the data of a page, decoded."""
    script = r'<script id="data" type="application/json">(.*?)</script>'
    data = json.loads(re.search(script, path.read_text(), re.DOTALL)[1])
    for key, dtype in (("counts", "<u4"), ("points", "<i2"), ("alphas", "u1")):
        data[key] = np.frombuffer(base64.b64decode(data[key]), dtype)
    return data


def check_traces(recording: Recording, path: Path, layers: list[str]) -> int:
    """Compares all traces of a page with `trace`; returns how many there are."""
    data = embedded(path)
    starts = [0, *np.cumsum(data["counts"]).tolist()]
    points = torch.from_numpy(data["points"].reshape(-1, 2) * data["unit"]).float()
    alphas = torch.from_numpy(data["alphas"] / 255).float()
    slot = 0
    dilation = dilation_map(recording.layers[layers[-1]])
    for index, (row, y) in enumerate(data["rows"]):
        for place, (column, x) in enumerate(data["columns"]):
            expected = trace(recording, (row, column), layers=layers, merge_above=0)
            assert expected.centre == (y, x)
            at = index * len(data["columns"]) + place
            assert data["dilation"][at] == pytest.approx(dilation[row, column].item(), abs=0.006)
            for locations, weights in zip(expected.levels, expected.weights, strict=True):
                found = slice(starts[slot], starts[slot + 1])
                torch.testing.assert_close(points[found], locations, atol=data["unit"], rtol=0)
                relative = weights / weights.max()
                torch.testing.assert_close(alphas[found], relative, atol=1 / 255, rtol=0)
                slot += 1
    assert slot == len(data["counts"])
    return len(data["dilation"])


def test_every_trace_is_embedded(recording: Recording, tmp_path: Path) -> None:
    path = write(recording, tmp_path / "page.html", [])
    assert check_traces(recording, path, list(recording.layers)) == 6 * 10
    assert embedded(path)["levels"] == [["3"], ["2"], ["1"]]


def test_a_page_of_many_traces_stays_below_five_megabytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(html_page, "MAX_POSITIONS", 400)  # to be quicker
    recording = recorded(192, 288, layers=4, groups=4)
    path = write(recording, tmp_path / "page.html", [])
    assert MAX_BYTES == 5_000_000 and 1_500_000 < path.stat().st_size <= MAX_BYTES
    assert check_traces(recording, path, ["2", "3", "4"]) < 400  # the last three layers


def test_locations_far_off_the_image_are_clipped(tmp_path: Path) -> None:
    recording = recorded(HEIGHT, WIDTH, layers=1, groups=1, std=1e4)
    data = embedded(write(recording, tmp_path / "page.html", []))
    points = data["points"] * data["unit"]
    assert abs(points).max() == pytest.approx(2 * WIDTH, abs=0.01)


def run_in_browser(path: Path, script: str, folder: Path) -> dict:
    """Runs a script in the loaded page and returns its result."""
    injected = f"""<script>
    const report = () => {{
      if (!document.body.dataset.ready) return setTimeout(report, 20);
      const found = (() => {{ {script} }})();
      const place = document.createElement("pre");
      place.id = "found";
      place.textContent = JSON.stringify(found);
      document.body.append(place);
    }};
    report();
    </script></body>"""
    changed = path.with_name("injected.html")
    changed.write_text(path.read_text().replace("</body>", injected))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=20000", "--window-size=1200,900", "--dump-dom"]
    done = subprocess.run([*command, changed.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@in_browser
def test_the_script_reads_what_is_embedded(recording: Recording, tmp_path: Path) -> None:
    path = write(recording, tmp_path / "page.html", [])
    script = (
        "return [[0, 0], [2, 4], [5, 9]].map(([r, c]) => [0, 1, 2].map((l) => locations(r, c, l)));"
    )
    found = run_in_browser(path, script, tmp_path / "profile")
    for position, levels in zip([(0, 0), (2, 4), (5, 9)], found, strict=True):
        expected = trace(recording, position, merge_above=0)
        for points, locations, weights in zip(
            levels, expected.levels, expected.weights, strict=True
        ):
            points = torch.tensor(points)
            torch.testing.assert_close(points[:, :2], locations, atol=0.01, rtol=0)
            torch.testing.assert_close(points[:, 2], weights / weights.max(), atol=0.004, rtol=0)


@in_browser
def test_objects_positions_and_keys_choose_what_is_drawn(
    recording: Recording, tmp_path: Path
) -> None:
    bins = torch.tensor([[5.0, 5, 15, 20], [15, 5, 25, 20]])
    objects = [
        PageObject("fork 93 %", (10.0, 5.0, 30.0, 25.0)),
        PageObject("<b>comb</b> & more 50 %", (50.0, 20.0, 75.0, 45.0), bins, bins + 3),
    ]
    path = write(recording, tmp_path / "page.html", objects, "a <!--<script> </script> title")
    found = run_in_browser(
        path,
        """
        const position = () => document.getElementById("position").textContent;
        const { width, height } = canvas;
        const pixels = () => Array.from(context.getImageData(0, 0, width, height).data).reduce(
          (sum, value, at) => (sum + value * (at % 9973)) % 1e9, 0);
        const seen = { title: document.getElementById("title").textContent, start: position() };
        seen.before = pixels();
        const buttons = document.querySelectorAll("#objects button");
        seen.labels = Array.from(buttons).map((button) => button.textContent);
        buttons[1].click();
        seen.second = position();
        seen.pressed = Array.from(buttons).map((button) => button.getAttribute("aria-pressed"));
        seen.after = pixels();
        document.getElementById("show-bins").click();
        seen.withoutBins = pixels();
        const at = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new MouseEvent("click", {
          clientX: at.left + at.width * 0.999, clientY: at.top + at.height * 0.999 }));
        seen.corner = position();
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
        seen.left = position();
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
        seen.still = position();
        document.getElementById("level-0").click();
        seen.twoLevels = pixels();
        return seen;
        """,
        tmp_path / "profile",
    )
    assert found["title"] == "a <!--<script> </script> title"
    assert found["labels"] == ["fork 93 %", "<b>comb</b> & more 50 %"]
    for key, point in (("start", (20, 15)), ("second", (62.5, 32.5)), ("corner", (79.9, 47.9))):
        row, column = position_at(recording, point)
        assert found[key].startswith(f"row {row}, column {column} of 3\nlevel 1: 18 sampling"), key
    assert found["pressed"] == ["false", "true"]
    assert len({found[key] for key in ("before", "after", "withoutBins", "twoLevels")}) == 4
    assert found["left"].startswith("row 5, column 8 of 3") and found["still"] == found["left"]


def test_nothing_is_fetched(recording: Recording, tmp_path: Path) -> None:
    text = write(recording, tmp_path / "page.html", []).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", text)
    assert text.startswith("<!DOCTYPE html>") and "__DATA__" not in text
