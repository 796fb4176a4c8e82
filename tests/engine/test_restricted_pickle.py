# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Pickles and checkpoints are loaded if they are data; nothing that they name is run or changed."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import datetime
import decimal
import gc
import io
import os
import pickle
import pickletools
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build
from detectron2.data.build import load_proposals_into_dataset

from dcn_plugin.engine import Checkpointer
from dcn_plugin.engine.restricted_pickle import BUILDERS, Placeholder, load, load_torch, restricted
from tests.engine.malicious_pickles import EXTENSION, MODULE, Command, atoms, call, malicious, named

HISTORY = "mmengine.logging.history_buffer"
WEIGHTS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "half": np.ones(3, np.float16),
    "count": np.array(7),
    "none": np.zeros((0, 4), np.float32),
    "big_endian": np.arange(3, dtype=">f4"),
}
ARRAYS = {
    **WEIGHTS,
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "names": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bcd"]),
}
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def same(left: Any, right: Any) -> bool:
    """Returns whether two objects have the same types and contents, down to the last item."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        names = list(left) == list(right)
        return names and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (np.ndarray, np.generic)):
        # Protocol 5 keeps another byte order, which PyTorch does not take: here it is converted.
        dtypes = left.dtype.newbyteorder("="), right.dtype.newbyteorder("=")
        return dtypes[0] == dtypes[1] and left.dtype.isnative and np.array_equal(left, right)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def load_bytes(content: bytes) -> Any:
    """Loads a pickle."""
    return load(io.BytesIO(content))


# Data.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_data_is_what_pickle_returns(protocol: int) -> None:
    metadata = OrderedDict(weight=np.ones(2))
    metadata._metadata = {"": {"version": 2}}  # as state dicts have it
    shared = [1]
    content = {
        "arrays": ARRAYS,
        "scalars": [np.float32(0.5), np.int64(-3), np.bool_(True), np.str_("text")],
        "python": [None, True, 1, -(2**70), 0.1, 2j, "täxt", b"", b"\x00\xff", {1}, frozenset("a")],
        "containers": ((), (1, [2, {"a": (3,)}]), [], {}, {(1, 2): "tuple"}, {np.int64(3): 4}),
        "state": metadata,
        "shared": (shared, shared),
        "tensors": [torch.arange(6).reshape(2, 3).T, torch.ones(2, dtype=torch.bfloat16)],
    }
    stream = pickle.dumps(content, protocol)
    loaded = load_bytes(stream)
    assert same(loaded, pickle.loads(stream))
    assert loaded["state"]._metadata == metadata._metadata
    assert loaded["shared"][0] is loaded["shared"][1]
    assert all(array.flags.writeable for array in loaded["arrays"].values())


def test_parameters_become_tensors() -> None:
    parameter = nn.Parameter(torch.ones(2))
    loaded = load_bytes(pickle.dumps(OrderedDict(weight=parameter)))
    assert type(loaded["weight"]) is torch.Tensor and torch.equal(loaded["weight"], parameter)


def python2(value: Any) -> bytes:
    """Returns the opcodes by which Python 2 pickles a value in protocol 2, as Caffe2 did."""
    if isinstance(value, str):
        content = value.encode("latin1")
        short = len(content) < 256
        return (
            b"U%c" % len(content) if short else b"T" + struct.pack("<I", len(content))
        ) + content
    if isinstance(value, dict):
        items = b"".join(python2(key) + python2(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, np.ndarray):
        core = "numpy.core.multiarray _reconstruct"
        empty = call(core, named("numpy", "ndarray"), (0,), python2("b"))
        state = b"(K\x01" + atoms(value.shape) + python2_dtype(value.dtype) + b"\x89"
        return empty + state + python2(value.tobytes().decode("latin1")) + b"tb"
    if isinstance(value, np.generic):
        content = python2(value.tobytes().decode("latin1"))
        return call("numpy.core.multiarray scalar", python2_dtype(value.dtype), content)
    return atoms(value)


def python2_dtype(dtype: np.dtype) -> bytes:
    order = b"(K\x03" + python2("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return call("numpy dtype", python2(dtype.str[1:]), 0, 1) + order


BLOBS = {
    "conv1_w": np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2),
    "conv1_w_momentum": np.ones((1, 3, 2, 2), np.float32),
    "res_conv1_bn_s": np.float32([0.5]),
    "weight_order": np.arange(300, dtype=np.float32),
}
FILES = {
    # Of Detectron2's model zoo; of torchvision, converted by Detectron2's tool.
    "zoo": pickle.dumps({"model": OrderedDict(WEIGHTS), "__author__": "Detectron2 Model Zoo"}),
    "torchvision": pickle.dumps(
        {"model": WEIGHTS, "__author__": "torchvision", "matching_heuristics": True}, 2
    ),
    "tensors": pickle.dumps({"model": {"weight": torch.ones(2)}, "__author__": "third_author"}),
    # Of Detectron: a model with its config, and MSRA's R-50.pkl.
    "detectron": b"\x80\x02"
    + python2({"blobs": BLOBS, "cfg": "MODEL:\n  TYPE: rcnn\n" * 20})
    + b".",
    "msra": b"\x80\x02" + python2({**BLOBS, "iteration": np.int64(7)}) + b".",
    "msra, rewritten by Python 3": pickle.dumps(BLOBS, 3),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_detectron2_and_caffe2_load_as_by_detectron2(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(FILES[name])
    loaded = Checkpointer(nn.Linear(1, 1))._load_file(str(path))
    assert same(loaded, DetectionCheckpointer(nn.Linear(1, 1))._load_file(str(path)))
    assert "conv1_w_momentum" not in loaded["model"] and loaded["model"]


BOXES = [np.float32([[0, 0, 5, 5], [1, 2, 9, 9]]), np.zeros((0, 4), np.float32)]
SCORES = [np.float32([0.5, 2.0]), np.zeros(0, np.float32)]
PROPOSALS = {
    "detectron2": pickle.dumps(
        {"ids": [7, 9], "boxes": BOXES, "objectness_logits": SCORES, "bbox_mode": 0}
    ),
    "detectron2, protocol 2": pickle.dumps(
        {"ids": [np.int64(7), "9"], "boxes": BOXES, "objectness_logits": SCORES}, 2
    ),
    "detectron": b"\x80\x02"
    + python2({"indexes": [7, 9], "boxes": BOXES, "scores": SCORES, "cfg": "RPN: {}"})
    + b".",
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_proposals_load_as_by_detectron2(name: str, tmp_path: Path) -> None:
    path = tmp_path / "proposals.pkl"
    path.write_bytes(PROPOSALS[name])
    records = [{"image_id": 9}, {"image_id": 7}]
    expected = load_proposals_into_dataset([dict(record) for record in records], str(path))
    with restricted(build):
        loaded = load_proposals_into_dataset([dict(record) for record in records], str(path))
    assert same(loaded, expected)
    assert loaded[1]["proposal_objectness_logits"].tolist() == [2.0, 0.5]
    assert build.pickle is pickle


# Code.


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the files of `malicious_pickles` make; the module and the extension that they name."""
    path = tmp_path / "marker"
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(path)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    copyreg.add_extension("posix", "mkdir", EXTENSION)
    pickle.loads(b"\x80\x02\x82%c." % EXTENSION)  # fills the cache
    yield path
    copyreg.remove_extension("posix", "mkdir", EXTENSION)


@pytest.mark.parametrize("name", malicious("unused"))
def test_code_is_not_run(name: str, marker: Path) -> None:
    stream = malicious(str(marker))[name]
    with pytest.raises(ValueError, match=r"^the pickle contains .*, which is not loaded"):
        load_bytes(stream)
    assert not os.path.lexists(marker) and MODULE not in sys.modules
    run_unrestricted(stream)
    assert os.path.lexists(marker)  # it would have run


def run_unrestricted(stream: bytes) -> None:
    after_it_has_run = (AttributeError, IndexError, TypeError, OSError, ValueError)
    with contextlib.suppress(*after_it_has_run, pickle.PickleError):
        pickle.loads(stream)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (collections.Counter("a"), "collections.Counter"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (bytearray(b"a"), "builtins.bytearray"),
        (range(3), "builtins.x?range"),
        (len, "builtins.len"),
        (dict, "builtins.dict"),
        (OrderedDict, "a class, a function or part of an array"),
        (np.ndarray, "a class, a function or part of an array"),
        (np.dtype("f4"), "a class, a function or part of an array"),
        (np.float32, "numpy.float32"),
        (decimal.Decimal(1), "decimal.Decimal"),
        (datetime.date(2025, 1, 2), "datetime.date"),
        (Path("a"), r"pathlib\.(_local\.)?PosixPath"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.float32, "torch.float32"),
        (np.array([None]), "an array of dtype 'O8'"),
        (np.array([(1, 2.0)], "i4,f4"), "an array of dtype 'V8'"),
        (np.array(["2025"], "datetime64[D]"), "an array of dtype 'M8'"),
        (np.ma.array([1]), "numpy.ma._mareconstruct|numpy.ma.core._mareconstruct"),
        (np.zeros(1).view(np.recarray), "numpy.*rec.*"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_not_data_is_named(protocol: int, value: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": value}, "__author__": "me"}, protocol))
    with pytest.raises(ValueError, match=rf"weights\.pkl contains ({what}), which is not loaded"):
        Checkpointer(nn.Linear(1, 1)).load(str(path))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Ja", "a" * 10**6, "ä"])
def test_names_in_errors_are_printable(name: str) -> None:
    stream = b"\x80\x04" + atoms("module", name) + b"\x93."
    with pytest.raises(ValueError, match="contains module") as error:
        load_bytes(stream)
    text = str(error.value)
    assert text.isprintable() and text.isascii() and len(text) < 600


STATES = {
    "dict": atoms({"evil": 1}),
    "slots": atoms((None, {"evil": 1, "__doc__": "evil"})),
    "defaults": atoms((None, {"__defaults__": (1, 2, 3), "function": 1, "value": 1})),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", BUILDERS, ids=".".join)
def test_what_a_file_may_name_cannot_be_changed(name: tuple[str, str], state: str) -> None:
    stream = b"\x80\x04" + named(*name) + STATES[state] + b"b."
    with pytest.raises(ValueError, match="contains a state for a function"):
        load_bytes(stream)


def pickled(body: bytes) -> bytes:
    """Returns a pickle of opcodes."""
    return b"\x80\x04" + body + b"."


FLOAT = call("numpy dtype", "f4", False, False)


def test_numpys_dtypes_are_not_changed() -> None:
    swapped = FLOAT + atoms((3, ">", None, None, None, -1, -1, 0)) + b"b"
    array = call("numpy._core.numeric _frombuffer", b"C\x04?\x80\x00\x00", swapped, (1,), "C")
    assert load_bytes(pickled(array)) == 1
    assert np.dtype("f4").isnative
    with pytest.raises(ValueError, match="contains an array with fields"):
        fields = (3, "<", None, ("a",), {"a": 1}, 8, 1, 0)
        load_bytes(pickled(FLOAT + atoms(fields) + b"b"))


def buffer(shape: tuple[int, ...]) -> bytes:
    """Returns opcodes of an array of one float32."""
    return call("numpy._core.numeric _frombuffer", b"C\x04abcd", FLOAT, shape, "C")


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Returns opcodes of a tensor of two float32."""
    _, (storage, *_) = torch.ones(2).__reduce_ex__(2)
    return call("torch._utils _rebuild_tensor_v2", storage, offset, size, stride, False, None)


UNICODE = call("numpy dtype", "U1", False, True)
ARRAY, TENSOR = pickle.dumps(np.ones(1), 4)[2:-1], pickle.dumps(torch.ones(2), 2)[2:-1]
DAMAGED = {
    "nothing": b"",
    "text": b"hello",
    "no end": pickled(b"}")[:-1],
    "half": pickle.dumps(WEIGHTS)[:100],
    "a persistent id": pickled(b"Pname\n"),
    "a binary persistent id": pickled(b"K\x01Q"),
    "an unknown extension": pickled(b"\x82\x01"),
    "content that is too short": pickled(buffer((2,))),
    "content that is too long": pickled(buffer((1,)).replace(b"\x04abcd", b"\x05abcde")),
    "a negative shape": pickled(buffer((-1, -1))),
    "a huge shape": pickled(buffer((2**40, 2**40, 0))),
    "a scalar without content": pickled(call("numpy._core.multiarray scalar", FLOAT, 1)),
    "a tensor before its storage": pickled(
        TENSOR.replace(b"K\x00K\x02", b"J\xff\xff\xff\xffK\x02")
    ),
    **{
        f"a tensor at {offset}, {size}, {stride} of two numbers": pickled(
            tensor(offset, size, stride)
        )
        for offset, size, stride in [
            (0, (3,), (1,)),
            (1, (2,), (1,)),
            (0, (2, 2), (1, 1)),
            (1, (2,), (-1,)),
            (0, (2**62, 4), (1, 1)),
            (0, (2,), (1, 1)),
        ]
    },
    "text beyond Unicode": pickled(
        call("numpy._core.numeric _frombuffer", b"C\x04\0\0\x11\0", UNICODE, (1,), "C")
    ),
    "an unhashable key": pickled(atoms(b"}", [1], 1, b"s")),
    "an array in a set": pickled(b"\x8f(" + ARRAY + b"\x90"),
    "an item of an array": pickled(ARRAY + b"K\x01a"),
    "a call of text": pickled(atoms("text", ()) + b"R"),
    "a class that is none": pickled(named("collections", "OrderedDict") + b")\x81"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(ValueError, match=r"weights\.pkl must be a pickle, but it is damaged: \w+"):
        Checkpointer(nn.Linear(1, 1)).load(str(path))


def test_deep_and_circular_containers_are_an_error() -> None:
    for body in (b"]" * 5000 + b"a" * 4999, b"]q\x00h\x00a"):
        with pytest.raises(ValueError, match="contains containers nested more than 100 deep"):
            load_bytes(pickled(body))


def test_a_shared_container_is_copied_once() -> None:
    """Each list has the one before it twice: copies of all copies would be 2**60."""
    levels = b"".join(b"]q%c(h%ch%ce0" % (i + 1, i, i) for i in range(60))
    assert len(load_bytes(pickled(b"]q\x000" + levels + b"h\x3c"))) == 2


# Random pickles.

# FUZZ_EXAMPLES=100000 searches at random.
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 1000)),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)
WATCHED = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "sqlite3.", "import", "exec")
watching: list[str] | None = None


def watch(event: str, args: tuple[Any, ...]) -> None:
    if watching is not None and event.startswith(WATCHED):
        watching.append(f"{event} {args}"[:200])


@pytest.fixture(scope="module")
def audit_hook() -> None:
    """Notes in `watching` what code of a pickle would do, until the process ends."""
    load_bytes(pickled(TENSOR))  # the first torch.load imports modules of PyTorch
    gc.collect()  # objects of other tests may remove files when they are deleted
    sys.addaudithook(watch)


COMMAND = f"touch {os.devnull}"
FRAGMENTS = st.sampled_from(
    [
        *(named(*name) for name in BUILDERS),
        *(named(*name.split()) for name in ("os system", "builtins eval", "numpy.lib format")),
        *(b"(", b"t", b"R", b"b", b"o", b")", b"]", b"}", b"a", b"e", b"s", b"u", b"0", b"2", b"1"),
        *(b"\x85", b"\x86", b"\x87", b"\x81", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"Q"),
        *(b"h\x00", b"h\x01", b"h\x02", b"q\x00", b"q\x01", b"\x82\x77", b"N", b"\x88", b"\x98"),
        *(b"(os\nsystem\n", b"ios\nsystem\n", b"\x92"),
        *map(atoms, (0, -1, 2**70, 0.5, "f4", "O8", "latin1", COMMAND, (1,), {"a": 1}, [1, 2])),
        *(b"C\x04abcd", b"\x96\x04\0\0\0\0\0\0\0abcd", ARRAY, TENSOR, FLOAT, buffer((1,))),
        atoms((3, "<", None, None, None, -1, -1, 0)),
    ]
)


def load_and_watch(stream: bytes) -> list[str]:
    """Loads a pickle, which may be an error; returns what it did to the system."""
    global watching
    watching = []
    try:
        load_bytes(stream)
    except ValueError:
        pass
    finally:
        found, watching = watching, None
    return found


def asks_for_memory(stream: bytes) -> bool:
    """Returns whether a pickle has a memo of gigabytes, against which there is no protection."""
    with contextlib.suppress(Exception):  # of a damaged pickle
        return any(
            opcode.name == "LONG_BINPUT" and index > 10**6
            for opcode, index, _ in pickletools.genops(stream)
        )
    return False


@pytest.mark.usefixtures("audit_hook")
@FUZZ
@given(st.lists(FRAGMENTS, max_size=25))
def test_random_pickles_do_nothing(fragments: list[bytes]) -> None:
    assert load_and_watch(pickled(b"".join(fragments))) == []


@pytest.mark.usefixtures("audit_hook")
@FUZZ
@given(st.data())
def test_changed_pickles_do_nothing(data: st.DataObject) -> None:
    streams = [*FILES.values(), *PROPOSALS.values(), *malicious("/dev/null/nothing").values()]
    stream = bytearray(data.draw(st.sampled_from(streams)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        fragment = data.draw(FRAGMENTS)
        stream[at : at + data.draw(st.integers(0, 8))] = fragment
    assume(not asks_for_memory(stream))
    assert load_and_watch(bytes(stream)) == []


def test_the_audit_hook_notes_code(audit_hook: None) -> None:
    global watching
    watching = []
    run_unrestricted(pickled(call("os system", COMMAND)))
    found, watching = watching, None
    assert any("os.system" in event for event in found)


# Files of torch.save.


@pytest.fixture
def history_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class of a module that can be pickled, but not imported after the test has removed it."""
    names = ("mmengine", "mmengine.logging", HISTORY)
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    history = type("HistoryBuffer", (), {"__module__": HISTORY})
    sys.modules[HISTORY].HistoryBuffer = history
    return history


class Evaluation(Command):
    """Does it through a function of Python itself."""

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
    if (module, zipped) == ("builtins", True):
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


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("value", [lambda history: history, lambda history: {"weight": [history]}])
def test_a_placeholder_among_the_weights_is_an_error(value, key, tmp_path, history_class) -> None:
    path = tmp_path / "file.pth"
    torch.save({key: value(history_class())}, path)
    with pytest.raises(ValueError, match=rf"file\.pth contains {HISTORY}\.HistoryBuffer, which"):
        Checkpointer(nn.Linear(3, 2)).load(str(path))


def test_a_placeholder_in_a_state_is_an_error(tmp_path, history_class) -> None:
    path, model = tmp_path / "file.pth", nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "hook": {"state": history_class()}}, path)
    Checkpointer(model).load(str(path))
    with pytest.raises(ValueError, match=rf"file\.pth contains {HISTORY}\.HistoryBuffer, which"):
        Checkpointer(model, hook=model).load(str(path))


def test_arguments_beside_a_model_are_not_loaded(tmp_path) -> None:
    path, model = tmp_path / "detr.pth", nn.Linear(3, 2)
    args = argparse.Namespace(output=Path("a"))
    torch.save({"model": model.state_dict(), "epoch": 3, "args": args}, path)
    loaded = Checkpointer(nn.Linear(3, 2)).load(str(path))
    assert loaded["epoch"] == 3 and isinstance(loaded["args"], Placeholder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_arrays_in_files_of_torch(core, zipped, tmp_path) -> None:
    path = tmp_path / "file.pth"
    states = {"best": np.float64(1.5), "random": np.random.get_state(), "seen": {np.int64(3)}}
    count = collections.Counter({np.str_("täxt"): np.int32(2)})
    content = {"arrays": ARRAYS, **states, "count": count, "size": torch.Size([2])}
    content["python"] = [b"", b"a", frozenset("a")]
    torch.save(content, path, pickle_module=named_as(core), _use_new_zipfile_serialization=zipped)
    assert f"{core}.multiarray".encode() in path.read_bytes()
    assert same(load_torch(str(path)), content)


def named_as(core: str) -> types.ModuleType:
    """Returns a pickle module whose pickles have NumPy's functions under another name."""

    class Pickler(pickle._Pickler):
        def save_global(self, value: Any, name: str | None = None) -> None:
            if not value.__module__.startswith(("numpy.core.", "numpy._core.")):
                super().save_global(value, name)
                return
            self.write(named(re.sub(r"numpy\._?core", core, value.__module__), value.__name__))
            self.memoize(value)

    module = types.ModuleType("renaming_pickle")
    module.Pickler, module.dump = Pickler, pickle.dump
    return module


def test_weights_that_are_arrays_load_from_files_of_torch(tmp_path) -> None:
    weights = nn.Linear(3, 2).state_dict()
    torch.save({name: value.numpy() for name, value in weights.items()}, tmp_path / "file.pth")
    model = nn.Linear(3, 2)
    Checkpointer(model).load(str(tmp_path / "file.pth"))
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.array([None, {}]), "an array of dtype 'O8'"),
        (np.array([(1, 2.0)], "i4,f4"), "an array of dtype 'V8'"),
        (np.array(["2025"], "datetime64[D]"), "an array of dtype 'M8'"),
        (np.dtype("f4"), "a class, a function or part of an array"),
        (np.zeros(1).view(np.recarray), "an array of a subclass of numpy.ndarray"),
    ],
    ids=["object", "fields", "date", "dtype", "subclass"],
)
def test_other_arrays_in_files_of_torch_are_named(value, what, tmp_path) -> None:
    torch.save({"trainer": {"state": value}, "weight": torch.ones(1)}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=rf"file\.pth contains ({what}), which is not loaded"):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "file.pth"))


def test_what_a_program_allows_in_torch_load_does_not_change_arrays(tmp_path) -> None:
    reconstruct = np.ones(1).__reduce__()[0]
    torch.save({"array": np.ones(2)}, tmp_path / "file.pth")
    with torch.serialization.safe_globals([np.dtype, np.ndarray, reconstruct, Path]):
        before = set(torch.serialization.get_safe_globals())
        assert load_torch(str(tmp_path / "file.pth"))["array"].tolist() == [1, 1]
        assert set(torch.serialization.get_safe_globals()) == before
    assert not {np.dtype, Path} & set(torch.serialization.get_safe_globals())


def test_numpy_scalars_in_the_state_of_a_run_are_resumed(tmp_path) -> None:
    class State:
        def __init__(self) -> None:
            self.best = np.float64(0)

        def state_dict(self) -> dict:
            return {"best": self.best}

        def load_state_dict(self, state: dict) -> None:
            self.best = state["best"]

    saved, resumed = State(), State()
    saved.best = np.float64(1.5)
    Checkpointer(nn.Linear(1, 1), str(tmp_path), trainer=saved).save("model_0000001")
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), trainer=resumed)
    checkpointer.resume_or_load("", resume=True)
    assert same(resumed.best, np.float64(1.5))
