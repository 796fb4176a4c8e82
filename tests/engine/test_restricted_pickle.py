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
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dcn_plugin.engine import Checkpointer
from dcn_plugin.engine.restricted_pickle import Placeholder, load_torch

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


class Evaluation(Command):
    """The same through a function of Python itself."""

    def __reduce__(self) -> tuple:
        return eval, (f"__import__('os').mkdir({str(self.target)!r})",)


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


def test_checkpoints_of_mmengine_load(tmp_path, history_class, monkeypatch) -> None:
    path, checkpoint = tmp_path / "epoch_1.pth", mmengine_checkpoint(history_class)
    torch.save(checkpoint, path)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    safe = torch.serialization.get_safe_globals()
    found = load_torch(str(path))
    assert set(torch.serialization.get_safe_globals()) == set(safe)
    assert found["meta"]["epoch"] == 1 and found["meta"]["cfg"] == "a = 1"
    assert isinstance(found["meta"]["time"], Placeholder)
    assert isinstance(found["message_hub"]["log_scalars"]["loss"], Placeholder)
    assert found["optimizer"] == checkpoint["optimizer"]
    model = nn.Linear(3, 2)
    Checkpointer(model).load(str(path))
    assert torch.equal(model.weight, checkpoint["state_dict"]["weight"])
    assert not any(name.startswith("mmengine") for name in sys.modules)


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", ["posix", "builtins"])
def test_nothing_of_a_file_runs(module, zipped, key, tmp_path) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "made"
    evil = Command(target) if module == "posix" else Evaluation(target)
    content = {key: {"weight": torch.ones(2, 3)}, "evil": evil}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = nn.Linear(3, 2)
    if (module, zipped, key) == ("builtins", True, "state_dict"):
        Checkpointer(model).load(str(path))
        assert model.weight.eq(1).all()
    else:
        name = "posix.mkdir" if module == "posix" else "eval"
        with pytest.raises(ValueError, match=rf"evil\.pth contains {name}, which is not loaded"):
            Checkpointer(model).load(str(path))
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it would have run


def test_an_allowed_class_is_not_changed(tmp_path) -> None:
    """BUILD with a state for slots sets attributes of any object, such as a class."""
    state = b"(N}X\x04\x00\x00\x00evilK\x01st"  # (None, {"evil": 1})
    stream = b"\x80\x02}X\x0a\x00\x00\x00state_dictccollections\nCounter\n" + state + b"bs."
    pickle.loads(stream)
    assert collections.Counter.evil == 1  # what pickle itself does
    del collections.Counter.evil
    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", stream)
        archive.writestr("evil/version", "3\n")
        archive.writestr("evil/byteorder", "little")
    with pytest.raises(ValueError, match=r"evil\.pth"):
        Checkpointer(nn.Linear(3, 2)).load(str(path))
    assert not hasattr(collections.Counter, "evil")


def test_a_placeholder_among_the_weights_is_an_error(tmp_path, history_class) -> None:
    path = tmp_path / "file.pth"
    torch.save({"state_dict": {"weight": history_class()}}, path)
    with pytest.raises(ValueError, match=r"file\.pth: weight must be a tensor.*HistoryBuffer"):
        Checkpointer(nn.Linear(3, 2)).load(str(path))
