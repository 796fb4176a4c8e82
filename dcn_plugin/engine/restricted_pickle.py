# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reads pickles and files of `torch.save` that anyone may have written, without running their code.

Detectron2 reads weights (`.pkl`) and proposals by Python's `pickle`, which calls any function that
a file names. Here a file may name only the functions that rebuild arrays, tensors and containers.
It gets none of the real ones, whose attributes it could change, but objects of this module that
check their arguments; the result is copied into new containers, item by item.

A file can still ask for more memory than there is.
"""

from __future__ import annotations

import copyreg
import io
import math
import pickle
import re
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import numpy as np
import torch

from detectron2.checkpoint import DetectionCheckpointer, detection_checkpoint
from fvcore.common.checkpoint import Checkpointer

from dcn_plugin.messages import UserError, one_line

SCALARS = (str, bytes, int, float, complex, bool, type(None))
DTYPE = re.compile(r"[<>=|]?[biufcSU][1-9]\d*")  # without Python objects, fields and dates
MAX_DEPTH = 100  # of containers in containers
_substitution = threading.RLock()


class ForbiddenError(pickle.UnpicklingError):
    """A pickle has something that is not data; the message names it."""


def load(file: IO[bytes], *, encoding: str = "latin1") -> Any:
    """Does what `pickle.load` does, for arrays, tensors, numbers, strings and containers of them.

    Args:
        file: opened for reading.
        encoding: of the strings that Python 2 has written.

    Raises:
        UserError: if the file contains anything else, or is damaged.
    """
    name = getattr(file, "name", "the pickle")
    copyreg.clear_extension_cache()  # objects in it would not be requested from find_class
    try:
        return _to_data(_Unpickler(file, encoding=encoding).load(), {})
    except ForbiddenError as error:
        raise UserError(rejection(name, str(error))) from error
    except OSError:
        raise
    except Exception as error:  # pickle.load of a damaged file may raise any
        message = _printable(f"{type(error).__name__}: {error}")
        raise UserError(f"{name} must be a pickle, but it is damaged: {message}") from error


def _printable(text: str) -> str:
    """Returns text of a file as one short line without control characters."""
    return ascii(one_line(text))[1:-1][:300]


def rejection(file: str, what: str) -> str:
    """Returns the error message for a file that contains something that is not data.

    Args:
        file: its path.
        what: the class or function.
    """
    return (
        f"{file} contains {_printable(what)}, which is not loaded: only arrays, tensors, numbers, "
        "strings, and lists, tuples, sets and dicts of them are. docs/untrusted-files.md says how "
        "to convert a file from a source that you trust"
    )


class _Unpickler(pickle.Unpickler):
    """Has no classes and functions but those of `BUILDERS`."""

    def find_class(self, module: str, name: str) -> Any:
        current = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        try:
            return BUILDERS[current, name]
        except KeyError:
            raise ForbiddenError(f"{current}.{name}") from None


class _Opaque:
    """An object that a pickle cannot change: BUILD, which sets any attribute, calls this method."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ForbiddenError("a state for a function or value that has none")


class _Builder(_Opaque):
    """A function that a pickle may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Value(_Opaque):
    """An array, scalar, tensor or part of one, until the whole pickle has been read."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None) -> None:
        self.value = value


class _Dtype(_Value):
    """A NumPy dtype."""

    __slots__ = ()

    def __init__(self, name: str, *flags: Any) -> None:
        if not DTYPE.fullmatch(name):
            raise ForbiddenError(f"an array of dtype {name!r}")
        super().__init__(np.dtype(name))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, byte_order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise ForbiddenError("an array with fields")
        self.value = self.value.newbyteorder(byte_order)


class _Array(_Value):
    """A NumPy array, which is empty until its state is set."""

    __slots__ = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran_order, content = state[-4:]  # a version may stand before them
        self.value = _new_array(dtype, shape, fortran_order, content)


def _new_array(dtype: _Dtype, shape: tuple[int, ...], fortran_order: bool, content: Any) -> Any:
    if isinstance(content, str):  # of Python 2
        content = content.encode("latin1")
    if type(dtype) is not _Dtype or any(type(n) is not int or n < 0 for n in shape):
        raise pickle.UnpicklingError("an array without dtype or shape")
    if len(content) != math.prod(shape) * dtype.value.itemsize:
        raise pickle.UnpicklingError(
            f"an array of {len(content)} bytes has shape {shape}, {dtype.value}"
        )
    array = np.empty(0, np.uint8)
    array.__setstate__((1, shape, dtype.value, bool(fortran_order), bytes(content)))
    if dtype.value.kind == "U":
        codes = np.frombuffer(content, np.dtype("u4").newbyteorder(dtype.value.byteorder))
        if (codes > sys.maxunicode).any():
            raise pickle.UnpicklingError("an array of text has a code point that is none")
    return array


def _empty_array(kind: Any, *args: Any) -> _Array:
    if kind is not NDARRAY:
        raise ForbiddenError("an array of a subclass of numpy.ndarray")
    return _Array()


def _array_from_buffer(
    content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: Any = None
) -> _Value:
    array = _new_array(dtype, shape, order == "F", content)
    return _Value(array if axes is None else array.transpose(axes))


def _numpy_scalar(dtype: _Dtype, content: Any) -> _Value:
    return _Value(_new_array(dtype, (), False, content)[()])


def _storage(content: bytes) -> _Value:
    try:
        storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ForbiddenError("a tensor with other objects in its storage") from error
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without storage")
    return _Value(storage)


def _tensor(storage: _Value, offset: int, size: Any, stride: Any, *options: Any) -> _Value:
    values, memory = torch.empty(0, dtype=storage.value.dtype), storage.value._untyped_storage
    numbers = [offset, *size, *stride]
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of offset, size and stride {numbers}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Else `set_` would enlarge it, by what was in memory.
    if 0 not in size and last >= memory.nbytes() // values.itemsize:
        raise pickle.UnpicklingError("a tensor that is larger than its storage")
    return _Value(values.set_(memory, offset, size, stride))


def _parameter(tensor: _Value, *options: Any) -> _Value:
    return tensor


def _empty_bytes() -> bytes:
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ForbiddenError(f"text encoded by {encoding}")
    return text.encode("latin1")


NDARRAY = _Opaque()
# What a pickle may name: NumPy's under their name since version 2, see `_Unpickler.find_class`.
BUILDERS: dict[tuple[str, str], _Opaque] = {
    ("numpy", "ndarray"): NDARRAY,
    **{
        (module, name): _Builder(function)
        for module, name, function in (
            ("numpy", "dtype", _Dtype),
            ("numpy._core.multiarray", "_reconstruct", _empty_array),
            ("numpy._core.multiarray", "scalar", _numpy_scalar),
            ("numpy._core.numeric", "_frombuffer", _array_from_buffer),
            ("torch.storage", "_load_from_bytes", _storage),
            ("torch._utils", "_rebuild_tensor_v2", _tensor),
            ("torch._utils", "_rebuild_parameter", _parameter),
            ("collections", "OrderedDict", OrderedDict),
            ("_codecs", "encode", _encode),  # bytes in protocols 0 to 2
            ("builtins", "bytes", _empty_bytes),
            ("builtins", "set", set),
            ("builtins", "frozenset", frozenset),
            ("builtins", "complex", complex),
        )
    },
}


def _forbid(loaded: Any) -> Any:
    raise ForbiddenError(f"an object of type {type(loaded).__name__}")


def _to_data(
    loaded: Any,
    done: dict[int, Any],
    other: Callable[[Any], Any] = _forbid,
    depth: int = 0,
) -> Any:
    """Copies what was unpickled, and takes out the values; `other` decides on other objects."""
    kind = type(loaded)
    if kind in SCALARS:
        return loaded
    if id(loaded) in done:  # the same object again
        return done[id(loaded)]
    if depth > MAX_DEPTH:
        raise ForbiddenError(f"containers nested more than {MAX_DEPTH} deep")
    copy = partial(_to_data, done=done, other=other, depth=depth + 1)
    if kind in (list, tuple, set, frozenset):
        data = kind(copy(item) for item in loaded)
    elif kind in (dict, OrderedDict, Counter):
        data = kind({})
        for key, value in loaded.items():
            data[copy(key)] = copy(value)
        if "_metadata" in getattr(loaded, "__dict__", ()):  # of a state dict
            data._metadata = copy(loaded._metadata)
    elif isinstance(loaded, _Value) and isinstance(
        loaded.value, (np.ndarray, np.generic, torch.Tensor)
    ):
        data = loaded.value
    elif isinstance(loaded, _Opaque):
        raise ForbiddenError("a class, a function or part of an array")
    else:
        data = other(loaded)
    done[id(loaded)] = data
    return data


# What a file of torch.save may name besides PyTorch's own, also by the names of NumPy 1, and the
# classes that may be given a state.
ALLOWED = [
    *(
        (function, f"{module.replace('_core', core)}.{name}")
        for (module, name), function in BUILDERS.items()
        if module.startswith("numpy") or name in ("bytes", "frozenset")
        for core in ("_core", "core")
    ),
    *(_Array, _Dtype),
]


class Placeholder:
    """Stands for an object of a class that is not imported; keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


def load_torch(path: str) -> Any:
    """Loads a file of `torch.save` onto the CPU by PyTorch's restricted unpickler.

    Arrays and scalars of NumPy are rebuilt as by `load`. Checkpoints of other projects, such as
    MMEngine's, have objects of their classes beside the weights. In a file with a `model` or
    `state_dict` these become placeholders; nothing is imported or called.

    Args:
        path: a local file.

    Raises:
        pickle.UnpicklingError: if the file contains other objects, or is damaged; objects beside
            the weights too if it is in the format of PyTorch before 1.6.
    """
    load_data = partial(torch.load, path, map_location="cpu", weights_only=True)
    with _allowing(ALLOWED):
        try:
            loaded = load_data()
        except pickle.UnpicklingError:
            try:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except ValueError:  # not a zip file
                names = []
            if not names:
                raise
            with torch.serialization.safe_globals(list(map(_placeholder, names))):
                loaded = load_data()
            if not isinstance(loaded, dict) or loaded.keys().isdisjoint(("model", "state_dict")):
                raise
    return _to_data(loaded, {}, lambda other: other)


def _placeholder(name: str) -> tuple[type[Placeholder], str]:
    module, _, short = name.rpartition(".")
    return type(short, (Placeholder,), {"__module__": module}), name


@contextmanager
def _allowing(objects: Iterable[Any]) -> Iterator[None]:
    """Allows objects in `torch.load`, in place of those that programs allow by the same names."""

    def name(allowed: Any) -> str:
        if isinstance(allowed, tuple):
            return allowed[1]
        return f"{allowed.__module__}.{allowed.__qualname__}"

    before, names = torch.serialization.get_safe_globals(), set(map(name, objects))
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(
        [*(allowed for allowed in before if name(allowed) not in names), *objects]
    )
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def require_no_placeholder(loaded: Any) -> None:
    """Raises `ForbiddenError` if a part of what `load_torch` returns has a placeholder."""

    def check(value: Any) -> Any:
        if isinstance(value, Placeholder):
            raise ForbiddenError(f"{type(value).__module__}.{type(value).__qualname__}")
        return value

    _to_data(loaded, {}, check)


@contextmanager
def restricted(module: ModuleType, **names: Callable[..., Any]) -> Iterator[None]:
    """Makes one of Detectron2's modules read pickles by `load`, for the time of a `with` statement.

        with restricted(detectron2.data.build):
            loader = build_detection_train_loader(cfg)

    Args:
        module: whose code calls `pickle.load`.
        names: of other modules that it has imported, each with the function to be its `load`.
    """
    names["pickle"] = load
    with _substitution:  # another thread must not undo it before this one has finished
        originals = {name: getattr(module, name) for name in names}
        try:
            for name, function in names.items():
                setattr(module, name, SimpleNamespace(load=function))
            yield
        finally:
            for name, original in originals.items():
                setattr(module, name, original)


class _TorchFiles(Checkpointer):
    """What Detectron2's checkpointer calls for files of `torch.save`."""

    def _load_file(self, f: str) -> Any:
        return load_torch(f)


class RestrictedCheckpointer(DetectionCheckpointer, _TorchFiles):
    """`DetectionCheckpointer` that loads data from any file, and runs no code of it."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        load_pyth = partial(torch.load, map_location="cpu", weights_only=True)
        try:
            with restricted(detection_checkpoint, torch=load_pyth):
                loaded = super()._load_file(filename)
            weights = loaded["model"]
            if isinstance(weights, dict):  # other objects may be beside a state_dict
                weights = weights.get("state_dict", weights)
            states = [loaded[name] for name in self.checkpointables if name in loaded]
            require_no_placeholder([weights, states])
            return loaded
        except NOT_A_CHECKPOINT as error:
            cause = error.__context__ if isinstance(error.__context__, ForbiddenError) else error
            message = str(cause)
            if isinstance(cause, ForbiddenError):
                raise UserError(rejection(filename, message)) from error
            if found := re.search(r"GLOBAL (\S+)", message):
                instead = "instead of a model, save its state_dict()"
                raise UserError(f"{rejection(filename, found[1])}; {instead}") from error
            if "weights_only" in message:  # PyTorch advises to switch it off
                message = "it has no tensors and plain containers alone: save model.state_dict()"
            reason = f"{type(error).__name__}: {_printable(message)}"
            if isinstance(error, EOFError):
                reason = "but it is empty or cut off"
            elif "TorchScript" in str(error):
                reason = "but it is TorchScript: save model.state_dict()"
            elif isinstance(error, (AssertionError, AttributeError, TypeError)):
                reason = "but it has no dict of tensors"
            elif isinstance(error, LookupError) or re.search(NO_PICKLE, str(error)):
                reason = (
                    "but it is damaged, or not one of torch.save or pickle (which must be named "
                    ".pkl)"
                )
            raise UserError(f"{filename} must be a checkpoint, {reason}") from error


# PyTorch's words about files that are neither; a LookupError is of the stack of its unpickler.
NO_PICKLE = "Unsupported operand|Invalid magic number"
# What reading another file raises.
NOT_A_CHECKPOINT = (
    *(EOFError, LookupError, RuntimeError, AttributeError, TypeError, AssertionError),
    pickle.UnpicklingError,
)
