# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Starting processes."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from dcn_plugin.engine import launch


def test_more_gpus_than_there_are_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="--num-gpus is 3, but PyTorch finds 2 GPUs"):
        launch(lambda args: None, Namespace(num_gpus=3))
