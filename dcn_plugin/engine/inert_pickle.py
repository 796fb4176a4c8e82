# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reads checkpoints that pickle objects of other projects beside their weights.

MMEngine's hold a message hub and a history, for example. `torch.load` refuses such files unless it
may import and run whatever they name. Here tensors, arrays and plain containers are read, and
everything else becomes a placeholder: its class is never imported.
"""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import IO, Any

import torch

# What may be called to rebuild an object: functions without side effects.
ALLOWED = {
    *(("collections", name) for name in ("OrderedDict", "Counter", "deque")),
    *(("builtins", name) for name in ("bytearray", "complex", "frozenset", "set", "slice")),
    ("_codecs", "encode"),  # bytes in old protocols
    *(
        ("torch._utils", name)
        for name in ("_rebuild_parameter", "_rebuild_tensor", "_rebuild_tensor_v2")
    ),
    *(("torch", name) for name in ("Size", "device", "Tensor")),
    ("torch.serialization", "_get_layout"),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class Placeholder:
    """Stands for an object of a class that is not imported; keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores an item, of a subclass of dict."""

    def append(self, value: Any) -> None:
        """Ignores an item, of a subclass of list."""

    def extend(self, values: Any) -> None:
        """Ignores items, of a subclass of list."""


class InertUnpickler(pickle.Unpickler):
    """Replaces all classes and functions but the allowed ones by placeholders."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed object, or a class of placeholders."""
        allowed = (module, name) in ALLOWED
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            allowed = True
        if allowed:
            return super().find_class(module, name)
        return type(name.rpartition(".")[2], (Placeholder,), {"__module__": module})


def _load(file: IO[bytes], **options: Any) -> Any:
    return InertUnpickler(file, **options).load()


# What torch.load expects of a module that unpickles.
_PICKLE = SimpleNamespace(__name__=__name__, Unpickler=InertUnpickler, load=_load)


def load_inert(path: str) -> Any:
    """Loads a file of `torch.save` onto the CPU, with placeholders for what it may not import.

    Args:
        path: a local file.
    """
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
