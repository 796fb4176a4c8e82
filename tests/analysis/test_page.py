# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The page in a real browser: what it traces is what Python traces."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dcn_plugin.analysis import Recording, cell_at, record, trace
from dcn_plugin.analysis.dilation import dilation_of_filters
from dcn_plugin.analysis.page import Shown, save_page
from dcn_plugin.layers import DeformConv2dPack

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(NAMES)}")
HEIGHT, WIDTH = 48, 80


@pytest.fixture(scope="module")
def recording() -> Recording:
    """Three layers, of which the last halves the map; offsets groups, and modulation."""
    torch.manual_seed(3)
    settings = {"padding": 1, "offset_groups": 2}
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 4, 1),
        DeformConv2dPack(4, 4, 3, modulated=True, **settings),
        DeformConv2dPack(4, 4, 3, **settings),
        DeformConv2dPack(4, 4, 3, stride=2, **settings),
    )
    for module in model[1:]:
        nn.init.normal_(module.offset_conv.weight, std=0.3)
    with record(model) as found, torch.no_grad():
        model(torch.rand(1, 3, HEIGHT, WIDTH))
    return found


def page(recording: Recording, path: Path, objects: list[Shown], title: str = "a title") -> Path:
    image = np.random.default_rng(0).integers(0, 255, (2 * HEIGHT, 2 * WIDTH, 3), np.uint8)
    save_page(path, title, image, recording, (HEIGHT, WIDTH), objects)
    return path


def run_in_browser(path: Path, script: str, folder: Path) -> dict:
    """Runs a script after the page has loaded, and returns what it gives."""
    told = f"""<script>
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
    changed = path.with_name("told.html")
    changed.write_text(path.read_text().replace("</body>", told))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=20000", "--window-size=1200,900", "--dump-dom"]
    done = subprocess.run([*command, changed.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@in_browser
def test_the_page_traces_as_python_does(recording: Recording, tmp_path: Path) -> None:
    path = page(recording, tmp_path / "page.html", [])
    found = run_in_browser(
        path,
        """
        const cells = [[0, 0], [2, 4], [5, 9]];
        return cells.map((cell) => ({
          levels: trace(cell),
          dilation: data.layers.map((layer) => dilation(layer, cell[0], cell[1])),
        }));
        """,
        tmp_path / "profile",
    )
    for cell, said in zip([(0, 0), (2, 4), (5, 9)], found, strict=True):
        expected = trace(recording, cell)
        assert len(said["levels"]) == 3
        for points, there, weights in zip(
            said["levels"], expected.levels, expected.weights, strict=True
        ):
            points = torch.tensor(points)
            torch.testing.assert_close(points[:, :2], there, atol=1e-3, rtol=0)
            torch.testing.assert_close(points[:, 2], weights, atol=1e-4, rtol=0)
        for name, value in zip(recording.choose(), said["dilation"], strict=True):
            exact = dilation_of_filters(name)[cell].item()
            assert value == pytest.approx(exact, rel=1e-4)


@in_browser
def test_one_clicks_objects_points_and_keys(recording: Recording, tmp_path: Path) -> None:
    bins = torch.tensor([[10.0, 10, 30, 40], [30, 10, 50, 40]])
    objects = [
        Shown("fork 93 %", (20.0, 10.0, 60.0, 50.0)),
        Shown("<b>comb</b> & more 50 %", (100.0, 40.0, 150.0, 90.0), bins, bins + 3),
    ]
    path = page(recording, tmp_path / "page.html", objects, "a <!--<script> </script> title")
    found = run_in_browser(
        path,
        """
        const here = () => document.getElementById("here").textContent;
        const pixels = () => Array.from(paint.getImageData(0, 0, canvas.width, canvas.height).data)
          .reduce((sum, value, at) => (sum + value * (at % 9973)) % 1e9, 0);
        const said = { title: document.getElementById("title").textContent, start: here() };
        said.before = pixels();
        const buttons = document.querySelectorAll("#objects button");
        said.labels = Array.from(buttons).map((button) => button.textContent);
        buttons[1].click();
        said.second = here();
        said.pressed = Array.from(buttons).map((button) => button.getAttribute("aria-pressed"));
        said.after = pixels();
        document.getElementById("parts").click();
        said.withoutParts = pixels();
        const at = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new MouseEvent("click", {
          clientX: at.left + at.width * 0.999, clientY: at.top + at.height * 0.999 }));
        said.corner = here();
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
        said.left = here();
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
        said.still = here();
        document.getElementById("level-0").click();
        said.twoLevels = pixels();
        return said;
        """,
        tmp_path / "profile",
    )
    assert found["title"] == "a <!--<script> </script> title"
    assert found["labels"] == ["fork 93 %", "<b>comb</b> & more 50 %"]
    # Half of the middles of the boxes, since the network saw half the image.
    for key, point in (("start", (20, 15)), ("second", (62.5, 32.5)), ("corner", (79.9, 47.9))):
        row, column = cell_at(recording, point)
        assert found[key].startswith(f"row {row}, column {column} of 3\nlevel 1: 18 points"), key
    assert found["pressed"] == ["false", "true"]
    assert len({found[key] for key in ("before", "after", "withoutParts", "twoLevels")}) == 4
    assert found["left"].startswith("row 5, column 8 of 3") and found["still"] == found["left"]


def test_nothing_is_fetched(recording: Recording, tmp_path: Path) -> None:
    text = page(recording, tmp_path / "page.html", []).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|https?://""", text)
    assert text.startswith("<!DOCTYPE html>") and "__DATA__" not in text
