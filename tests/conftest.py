# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What all tests share: devices, seeds, and who is skipped for want of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.devices import CUDA, EMULATOR

NO_GPU = "needs a CUDA GPU, and there is none"
# What the ops do not need. A file that imports one of them is skipped where it is not installed.
OPTIONAL = {
    *("detectron2", "fvcore", "iopath", "torchvision", "pycocotools"),
    *("cv2", "matplotlib", "PIL", "tqdm"),
    *("onnx", "onnxruntime", "onnxscript"),
}


settings.load_profile("ci")  # Hypothesis: without deadlines, and with fixed seeds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords or ("cuda" in item.keywords and not EMULATOR):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips a file that cannot import an optional package, instead of failing."""
    report = yield
    error = report.call.excinfo.value.__cause__ if report.failed else None
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {error.name}")
    return report


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
    counts = [c for c in terminalreporter.config.stash[EMULATED] if c["launches"]]
    if counts:
        terminalreporter.section("CUDA kernels, run by the emulator on the CPU")
        for name in ("launches", "threads", "shuffles", "atomics"):
            terminalreporter.line(f"{name:9s} {sum(c[name] for c in counts):,d}")
        seeds = " ".join(str(c["seed"]) for c in counts)
        terminalreporter.line(f"seeds of the order of threads: {seeds} (DCN_EMULATOR_SEED)")


# What the emulator ran, in this process and in those of pytest-xdist.
EMULATED = pytest.StashKey[list[dict[str, int]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EMULATED] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[EMULATED].extend(node.workeroutput.get("emulated", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if EMULATOR:
        session.config.stash[EMULATED].append(asdict(EMULATOR.counts()))
        # pytest-xdist sends it from its processes.
        getattr(session.config, "workeroutput", {})["emulated"] = session.config.stash[EMULATED]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device in turn."""
    return CUDA if request.param == "cuda" else request.param


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """Skips a test that compares with torchvision where it is not installed."""
    return pytest.importorskip("torchvision")


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
