# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Pickles that make a file or a folder when `pickle.load` reads them, written opcode by opcode."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch

EXTENSION = 0x77  # code in the extension registry, of os.mkdir
MODULE = "module_that_makes_a_file"


class Command:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path | str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def atoms(*values: object) -> bytes:
    """Returns opcodes that push values one after another; bytes are opcodes already."""
    return b"".join(
        value if isinstance(value, bytes) else pickle.dumps(value, 2)[2:-1] for value in values
    )


def named(module: str, name: str) -> bytes:
    """Returns opcodes that push a class or function by GLOBAL; by STACK_GLOBAL if it is dotted."""
    return atoms(module, name) + b"\x93" if "." in name else f"c{module}\n{name}\n".encode()


def call(function: bytes | str, *args: object) -> bytes:
    """Returns opcodes that call a function by REDUCE.

    Args:
        function: opcodes that push it, or its module and name, such as "os mkdir".
        args: as for `atoms`.
    """
    if isinstance(function, str):
        function = named(*function.split())
    return function + b"(" + atoms(*args) + b"tR"


def malicious(path: str) -> dict[str, bytes]:
    """Returns pickles, by a name; each makes `path` when `pickle.load` reads it.

    Args:
        path: does not exist yet. `MODULE` must make it when it is imported, and `EXTENSION` be
            registered.
    """
    touch = f"touch {path}"
    code = f"open({path!r}, 'w').close()"
    mkdir, getattr_ = named("os", "mkdir"), "builtins getattr"
    inner = pickle.dumps(Command(path), 2).decode("latin1")
    inner_bytes = call("_codecs encode", inner, "latin1")
    os_module = named("posixpath", "os")
    bodies = {
        # Functions of the operating system, by all opcodes that call.
        "os.system": call("os system", touch),
        "posix.system": call("posix system", touch),
        "os.mkdir": call("os mkdir", path),
        "os.makedirs": call("os makedirs", path),
        "os.symlink": call("os symlink", "/", path),
        "os.mkfifo": call("os mkfifo", path),
        "os.spawnlp": call("os spawnlp", 0, "touch", "touch", path),
        "subprocess.call": call("subprocess call", ["touch", path]),
        "subprocess.getoutput": call("subprocess getoutput", touch),
        "shutil.copy": call("shutil copy", __file__, path),
        "INST": b"(" + atoms(touch) + b"ios\nsystem\n",
        "OBJ": b"(" + mkdir + atoms(path) + b"o",
        "NEWOBJ": named("zipfile", "ZipFile") + b")\x81" + b"0" + call("os mkdir", path),
        "STACK_GLOBAL": atoms("os", "mkdir", b"\x93", (path,), b"R"),
        "a memoized name": atoms("os", b"q\x050", "mkdir", b"q\x060h\x05h\x06\x93", (path,), b"R"),
        "the extension registry": b"\x82" + bytes([EXTENSION]) + atoms((path,)) + b"R",
        "a framed protocol 4": pickle.dumps(Command(path), 4)[2:-1],
        # Python.
        "eval": call("builtins eval", code),
        "exec": call("builtins exec", code),
        "exec of compiled code": call("builtins exec", call("builtins compile", code, "f", "exec")),
        "open": call("builtins open", path, "w"),
        "io.open": call("io open", path, "w"),
        "FileIO": call("_io FileIO", path, "w"),
        "import of a module": named(MODULE, "anything"),
        "__import__": call("builtins __import__", MODULE),
        "importlib": call("importlib import_module", MODULE),
        "runpy": call("runpy run_module", MODULE),
        "timeit": call("timeit timeit", code, "pass", named("time", "perf_counter"), 1),
        "cProfile": call("cProfile runctx", code, {}, {}, f"{path}.profile"),
        "pickle in a pickle": call("pickle loads", inner_bytes),
        "logging": call("logging FileHandler", path),
        "sqlite3": call("sqlite3 connect", path) + b"0",
        # Functions that are reached through others.
        "a dotted name": call(named("posixpath", "os.mkdir"), path),
        "a dotted name in torch": call(named("torch", "os.mkdir"), path),
        "getattr": call(call(getattr_, os_module, "mkdir"), path),
        "globals of an allowed function": call(
            call(
                "operator getitem",
                call(getattr_, named("torch._utils", "_rebuild_tensor_v2"), "__globals__"),
                "__builtins__",
            )
            + b"0"
            + named("os", "mkdir"),
            path,
        ),
        "attrgetter": call(call(call("operator attrgetter", "mkdir"), os_module), path),
        "methodcaller": call(call("operator methodcaller", "mkdir", path), os_module),
        "partial": call("functools partial", mkdir, path) + b")R",
        "partial by BUILD": call("functools partial", named("builtins", "print"))
        + atoms((None, (path,), {}, None)).replace(b"N", mkdir, 1)
        + b"b)R",
        "map in a list": call("builtins list", call("builtins map", mkdir, [path])),
        "map in a set": call("builtins set", call("builtins map", mkdir, [path])),
        "map in an OrderedDict": call(
            "collections OrderedDict", call("builtins map", mkdir, [path])
        ),
        "defaultdict": call(
            "operator getitem",
            call("collections defaultdict", call("functools partial", mkdir, path)),
            1,
        ),
        "reduce": call("functools reduce", mkdir, [path, 0o755]),
        "Thread": call(call(getattr_, call("threading Timer", 0, mkdir, [path]), "run")),
        # Where data stands.
        "weights": atoms(b"}", "model", b"}", "weight", call("os mkdir", path), b"ss"),
        "a key": atoms(b"}", call("os system", touch), 1, b"s"),
        "a discarded value": call("os mkdir", path) + b"0}",
        "beside a model": atoms(
            {"model": {}, "__author__": "zoo"}, "x", call("os mkdir", path), b"s"
        ),
        "the state of an OrderedDict": call("collections OrderedDict")
        + atoms(b"}", "hook", call("os mkdir", path), b"sb"),
        "the shape of an array": call("numpy zeros", call("os system", touch)),
        "the name of a dtype": call("numpy dtype", call("os mkdir", path)),
        # NumPy's and PyTorch's own.
        "numpy.memmap": call("numpy memmap", path, "u1", "w+", 0, 1),
        "numpy.savetxt": call("numpy savetxt", path, [1]),
        "numpy runstring": call("numpy.testing._private.utils runstring", code, {}),
        "torch.save": call("torch.serialization save", [1], path),
        "torch.load": call(
            "torch.storage _load_from_bytes",
            call("_codecs encode", legacy_torch_file(path).decode("latin1"), "latin1"),
        ),
        "a storage in a file": call(named("torch", "UntypedStorage.from_file"), path, True, 4),
    }
    return {
        **{name: b"\x80\x04" + body + b"." for name, body in bodies.items()},
        "protocol 0": pickle.dumps(Command(path), 0),
        "eval by Python 2's name": b"\x80\x02" + call("__builtin__ eval", code) + b".",
    }


def legacy_torch_file(path: str) -> bytes:
    """Returns a file of torch.save that makes a folder, in the format before PyTorch 1.6."""
    file = io.BytesIO()
    torch.save(Command(path), file, _use_new_zipfile_serialization=False)
    return file.getvalue()
