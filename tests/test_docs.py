# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""README and docs: their Python blocks run, and the files and commands that they name exist.

A block that cannot run in a test has a line `<!-- not run: reason -->` before it; its imports run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import dcn_plugin  # noqa: F401  registers the data sets
from tests.conftest import OPTIONAL

try:
    from detectron2.data import DatasetCatalog, MetadataCatalog
except ModuleNotFoundError:
    DatasetCatalog = MetadataCatalog = None

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARKER = "<!-- not run"


class Block(NamedTuple):
    """A block of Python code, the line before its first, and why it is not run."""

    page: Path
    line: int
    code: str
    reason: str | None

    def tree(self) -> ast.Module:
        """Parses the block, with the line numbers of the page."""
        return ast.parse("\n" * self.line + self.code, self.page.name)

    def run(self, tree: ast.Module) -> None:
        """Runs statements of the block in a clean namespace."""
        try:
            exec(compile(tree, str(self.page), "exec"), {"__name__": "__main__"})
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package not in OPTIONAL and package not in (self.reason or "").lower().split():
                raise
            pytest.skip(f"needs {error.name}")


def blocks() -> Iterator[Block]:
    """Yields the Python blocks of all pages."""
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("code"))
            yield Block(page, line, match["code"], match["reason"])


def by_place(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provides a folder with the configs, and weights instead of downloads; forgets data sets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", zero_weights)
    before = data_sets()
    yield
    for name in data_sets() - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def data_sets() -> set[str]:
    """Returns the data sets that are registered."""
    return set(DatasetCatalog) if DatasetCatalog else set()


def zero_weights(url: str, path: str, *_: object, **__: object) -> None:
    """Writes the weights of one of torchvision's models in the place of a download."""
    from torchvision import models

    name = Path(url).name.partition("-")[0]
    state = models.get_model(name, weights=None).state_dict()
    # Expanded from one element, so that the file is small.
    torch.save({k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}, path)


@pytest.mark.parametrize("block", blocks(), ids=by_place)
@pytest.mark.usefixtures("surroundings")
def test_python_block_runs(block: Block) -> None:
    if block.reason:
        imports = [n for n in block.tree().body if isinstance(n, ast.Import | ast.ImportFrom)]
        block.run(ast.Module(imports, []))
        pytest.skip(f"not run: {block.reason}")
    block.run(block.tree())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_and_every_marker_is_recognized(page: Path) -> None:
    text, found = page.read_text(), [block for block in blocks() if block.page == page]
    assert len(re.findall(r"^ *(?:```+|~~~+) *py", text, re.MULTILINE | re.I)) == len(found)
    assert text.count(MARKER) == sum(block.reason is not None for block in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_targets_and_files_that_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^ *|`)make ([a-z-]+)\b", text, re.MULTILINE)) <= targets
    files = re.findall(r"(?:python|--config-file) ([\w./-]+\.(?:py|yaml))", text)
    assert not {name for name in files if not (ROOT / name).exists()}
    modules = re.findall(r"python -m ((?:dcn_plugin|tests)[\w.]*)", text)
    assert not {m for m in modules if not (ROOT / (m.replace(".", "/") + ".py")).exists()}
