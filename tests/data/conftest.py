# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A data set in COCO's format, whose content tests change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_coco import write_tiny_coco


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with annotations.json."""
    path = tmp_path_factory.mktemp("coco") / "data"
    write_tiny_coco(path, images=3)
    return path


@pytest.fixture
def content(folder: Path) -> dict[str, Any]:
    """What is in its annotations.json."""
    return json.loads((folder / "annotations.json").read_text())
