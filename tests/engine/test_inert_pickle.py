# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checkpoints with objects of other projects load without importing or running anything of them."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dcn_plugin.engine import Checkpointer
from dcn_plugin.engine.inert_pickle import Placeholder, load_inert

MODULE = "mmengine.logging.history_buffer"


@pytest.fixture
def history_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a module that can be pickled, but not imported after the test has removed it."""
    names = ("mmengine", "mmengine.logging", MODULE)
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    history = type("HistoryBuffer", (), {"__module__": MODULE})
    sys.modules[MODULE].HistoryBuffer = history
    return history


class Command:
    """Runs a command when it is unpickled, by means of pickle's usual rules."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def mmengine_checkpoint(history_class: type) -> dict:
    """Returns what MMEngine writes during training."""
    history = history_class()
    history.values = np.arange(3.0)
    named = collections.OrderedDict(loss=history)
    return {
        "meta": {"epoch": 1, "iter": 7, "time": datetime.datetime(2025, 1, 2), "cfg": "a = 1"},
        "state_dict": collections.OrderedDict(
            weight=torch.randn(2, 3), bias=torch.randn(2, dtype=torch.float64)
        ),
        "message_hub": {"log_scalars": named, "runtime_info": {"seed": np.int64(3)}},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_mmengine_load(zipped, tmp_path, history_class, monkeypatch) -> None:
    path, checkpoint = tmp_path / "epoch_1.pth", mmengine_checkpoint(history_class)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    found = load_inert(str(path))
    assert found["meta"]["epoch"] == 1 and found["meta"]["cfg"] == "a = 1"
    assert isinstance(found["meta"]["time"], Placeholder)
    assert isinstance(found["message_hub"]["log_scalars"]["loss"], Placeholder)
    assert found["message_hub"]["runtime_info"]["seed"] == 3
    assert found["optimizer"] == checkpoint["optimizer"]
    model = nn.Linear(3, 2)
    Checkpointer(model).load(str(path))
    assert torch.equal(model.weight, checkpoint["state_dict"]["weight"])
    assert not any(name.startswith("mmengine") for name in sys.modules)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_of_a_file_runs(zipped, tmp_path) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "made"
    content = {"state_dict": {"weight": torch.ones(2, 3)}, "evil": Command(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = nn.Linear(3, 2)
    Checkpointer(model).load(str(path))
    assert not target.exists() and model.weight.eq(1).all()
    torch.load(path, weights_only=False)
    assert target.exists()  # it would have run


def test_subclasses_of_containers_are_placeholders(tmp_path, monkeypatch) -> None:
    module = types.ModuleType("foreign")
    monkeypatch.setitem(sys.modules, "foreign", module)
    for base in (dict, list):
        kind = type(f"My{base.__name__}", (base,), {"__module__": "foreign"})
        setattr(module, kind.__name__, kind)
    content = {"model": {}, "a": module.Mydict(x=1), "b": module.Mylist([1, 2])}
    torch.save(content, tmp_path / "file.pth")
    monkeypatch.delitem(sys.modules, "foreign")
    found = load_inert(str(tmp_path / "file.pth"))
    assert isinstance(found["a"], Placeholder) and isinstance(found["b"], Placeholder)


def test_a_placeholder_among_the_weights_is_an_error(tmp_path, history_class) -> None:
    path = tmp_path / "file.pth"
    torch.save({"state_dict": {"weight": history_class()}}, path)
    with pytest.raises(ValueError, match=r"file\.pth: weight must be a tensor.*HistoryBuffer"):
        Checkpointer(nn.Linear(3, 2)).load(str(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_all_dtypes_and_parameters_load(dtype, tmp_path) -> None:
    content = {"a": torch.ones(2, 3).to(dtype).t(), "b": nn.Parameter(torch.ones(2)), "c": dtype}
    torch.save(content, tmp_path / "file.pth")
    found = load_inert(str(tmp_path / "file.pth"))
    assert torch.equal(found["a"], content["a"]) and found["c"] is dtype
    assert isinstance(found["b"], nn.Parameter)
