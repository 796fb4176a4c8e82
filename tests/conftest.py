# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What all tests share: devices, seeds, and who is skipped for want of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NO_GPU = "needs a CUDA GPU, and there is none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names and counts what was skipped for want of a GPU."""
    skipped = Counter(
        report.nodeid.split("[")[0]
        for report in terminalreporter.stats.get("skipped", [])
        if NO_GPU in str(report.longrepr)
    )
    if skipped:
        terminalreporter.section(f"{sum(skipped.values())} cases skipped: {NO_GPU}")
        for name, count in sorted(skipped.items()):
            terminalreporter.line(f"{count:4d}  {name}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> Iterator[None]:
    """Seeds PyTorch, and keeps float32 at its own precision."""
    torch.manual_seed(0)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Lets a test call torch.set_num_threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_coco(tmp_path: Path) -> Iterator[str]:
    """Registers four generated images with Detectron2; yields the name of the data set."""
    from tests import datasets

    with datasets.tiny_coco(tmp_path / "tiny_coco") as name:
        yield name


@pytest.fixture(scope="module")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shapes in a folder of their own, made there when they are asked for."""
    from tests.datasets import data_sets_in

    folder = tmp_path_factory.mktemp("datasets")
    with data_sets_in(str(folder)):
        yield folder
