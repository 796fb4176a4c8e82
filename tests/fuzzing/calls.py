# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Random calls of the ops, most of them invalid, and the checks of what each call did.

`make fuzz` runs them under sanitizers, guided by the coverage of the C++ code; the test of this
module runs a few. A call must return, with the same bits each time and without writing to its
arguments, or raise one of the documented exceptions, whose message starts with the op.
"""

from __future__ import annotations

import ctypes
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dcn_plugin import ops
from tests.deterministic import deterministic_algorithms
from tests.ops import strides, test_deform_conv2d_property, test_roi_pool_property
from tests.ops.conv_cases import cast
from tests.ops.roi_cases import RoiCase
from tests.ops.test_deform_conv2d_property import FORMATS, conv_cases, laid_out
from tests.ops.test_roi_pool_property import roi_cases
from tests.tolerances import DTYPES

# It writes each exception with its traceback.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)

OPS = torch.ops.dcn_plugin
CONVOLUTIONS = ("deform_conv2d", "op deform_conv2d", "op _deform_conv2d_backward")
ROI_FUNCTIONS = ("roi_pool", "ps_roi_pool", "deform_roi_pool", "deform_ps_roi_pool")
ROI_OPS = ("op deform_roi_pool", "op _deform_roi_pool_backward")

DOCUMENTED = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)
# What PyTorch says, without the name of an op, if a result does not fit into memory.
NO_MEMORY = ("can't allocate memory", "integer multiplication overflow", "calculation overflowed")

NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF, 0.0, -0.0, 1e-40, 65504.0, 3e9, 2.0**63, 1e30, -1e30, 1e300)
# Nothing in between: a valid call is either fast or does not fit into memory.
INTEGERS = (-(2**63), -(2**31) - 1, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62)
OTHER_DTYPES = (
    *(torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128),
    torch.float8_e4m3fn,
)
MODES = ("align", "bin", "msra", "", "Align", "align\0", "a" * 300, "é")

# How often each function ended how, for the report of `make fuzz`.
outcomes: Counter[tuple[str, str]] = Counter()


@contextmanager
def limited_memory(more: int = 2**31) -> Iterator[None]:
    """Lets the process allocate so many bytes more: larger results raise an exception."""
    sizes = Path("/proc/self/statm").read_text().split()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(sizes[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Labelled(Tensor):
    """A subclass of Tensor without methods of its own."""


@dataclass
class Call:
    """A call of a function of dcn_plugin.ops, or of a registered op.

    Attributes:
        name: of the function; "op ..." for an operator of torch.ops.dcn_plugin.
        arguments: by name.
        backward: whether the gradients of all floating arguments are computed too.
        fake: whether the arguments become fake tensors.
    """

    name: str
    arguments: dict[str, Any]
    backward: bool = False
    fake: bool = False

    def check(self) -> None:
        """Runs the call, and raises AssertionError for what must not happen."""
        before = _snapshot(self.arguments)
        torch.set_num_threads(1)
        result = self.run()
        outcomes[self.name, result.kind] += 1
        assert not result.problem, f"{result.problem}\n{self}"
        assert _snapshot(self.arguments) == before, f"an argument was written to\n{self}"
        # New tensors are filled with NaN, so that what is not written shows.
        torch.set_num_threads(2)
        with deterministic_algorithms():
            torch.utils.deterministic.fill_uninitialized_memory = True
            again = self.run()
        assert (result.kind, result.bits) == (again.kind, again.bits), (
            f"the second call differs\n{self}"
        )
        if result.kind == "value" and not self.fake and _are_plain(self.arguments):
            fake = Call(self.name, self.arguments, self.backward, fake=True).run()
            assert fake.layout == result.layout, f"fake tensors differ: {fake}, {result}\n{self}"

    def run(self) -> Result:
        """Runs the call, without checks."""
        try:
            if self.fake:
                with FakeTensorMode() as mode:
                    return Result.of(self._run(_map(mode.from_tensor, self.arguments)))
            return Result.of(self._run(self.arguments))
        except Exception as error:
            return Result.of_error(error)

    def _run(self, arguments: dict[str, Any]) -> list[Tensor | None]:
        function = getattr(OPS if self.name.startswith("op ") else ops, self.name.split()[-1])
        if not self.backward:
            output = function(**arguments)
            return list(output) if isinstance(output, tuple) else [output]
        arguments = _map(_leaf, arguments)
        output = function(**arguments)
        leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
        if not leaves:
            return [output]
        grad_output = torch.ones_like(output).mul_(0.75)
        return [output, *torch.autograd.grad(output, leaves, grad_output, allow_unused=True)]

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={_shown(v)}" for k, v in self.arguments.items())
        return f"{self.name}({shown}){' with gradients' * self.backward}{' as fake' * self.fake}"

    __repr__ = __str__


@dataclass
class Result:
    """How a call ended: the bytes and layouts of its results, or what is wrong with its error."""

    kind: str
    bits: Any = None
    layout: Any = None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.layout or self.problem}"

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> Result:
        layout = [t if t is None else (t.dtype, tuple(t.shape), t.stride()) for t in tensors]
        return Result("value", [_bits(t) for t in tensors], layout)

    @staticmethod
    def of_error(error: Exception) -> Result:
        kind, message = type(error).__name__, str(error)
        if isinstance(error, RuntimeError) and any(text in message for text in NO_MEMORY):
            return Result("no memory")
        names = ("deform_conv2d", "deform_roi_pool")
        if not isinstance(error, DOCUMENTED) or not any(name in message for name in names):
            return Result(kind, message, problem=f"undocumented {kind}: {message}")
        if "INTERNAL ASSERT" in message:
            return Result(kind, message, problem=f"internal error: {message}")
        return Result(kind, message)


@dataclass
class Comparison:
    """A valid call that is compared with torchvision or with the reference in float64."""

    name: str
    compare: Callable[[], None]

    def check(self) -> None:
        """Raises AssertionError if they differ."""
        outcomes[self.name, "compared"] += 1
        self.compare()


def _map(function: Callable[[Tensor], Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Applies a function to the tensors among the arguments, also to those in lists."""

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        return function(value) if isinstance(value, Tensor) else value

    return {name: visit(value) for name, value in arguments.items()}


def _leaf(tensor: Tensor) -> Tensor:
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    usable = differentiable and not tensor.is_inference()
    return tensor.detach().requires_grad_() if usable else tensor


def _snapshot(arguments: dict[str, Any]) -> list[bytes]:
    """Returns the bytes of all memory that the arguments refer to."""
    found: list[bytes] = []

    def add(tensor: Tensor) -> None:
        if _is_readable(tensor):
            found.append(_bytes_of(tensor))

    _map(add, arguments)
    return found


def _is_readable(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    plain = plain and not tensor.is_nested and not tensor.is_quantized
    return plain and not isinstance(tensor, torch._subclasses.FakeTensor)


def _are_plain(arguments: dict[str, Any]) -> bool:
    """Returns whether all tensors are such as a fake tensor can stand for."""
    plain: list[bool] = []
    _map(lambda t: plain.append(_is_readable(t) and type(t) is Tensor), arguments)
    return all(plain)


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None or not _is_readable(tensor):
        return None
    return _bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _bytes_of(tensor: Tensor) -> bytes:
    """Returns all memory of a tensor, also what lies between its elements."""
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if not isinstance(value, Tensor):
        return repr(value)
    described = [type(value).__name__, str(value.dtype).removeprefix("torch.")]
    if not value.is_nested:
        described += [f"size {tuple(value.shape)}"]
    if value.layout == torch.strided and not value.is_nested:
        described += [f"stride {value.stride()}"]
    return f"<{', '.join(described)}, {value.device.type}, {value.layout}>"


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draws a valid call, and makes up to three changes to its arguments."""
    name = draw(st.sampled_from((*CONVOLUTIONS, *ROI_FUNCTIONS, *ROI_OPS)))
    torch.manual_seed(draw(st.integers(0, 99)))
    arguments = draw(_conv_arguments(name) if "conv" in name else _roi_arguments(name))
    try:
        for _ in range(draw(st.integers(0, 3))):
            key = draw(st.sampled_from(sorted(arguments)))
            arguments[key] = draw(_changed(key, arguments[key]))
    except (RuntimeError, ValueError, TypeError, IndexError):
        reject()  # PyTorch cannot make such a tensor
    backward = not name.endswith("_backward") and draw(st.booleans())
    fake = draw(st.integers(0, 19)) == 0 and _are_plain(arguments)
    return Call(name, arguments, backward, fake)


@st.composite
def _conv_arguments(draw: st.DrawFn, name: str) -> dict[str, Any]:
    case = draw(conv_cases())
    call = cast(case.draw(dtype=draw(_dtypes)), draw(_dtypes), ["offset", "mask"])
    if draw(st.integers(0, 9)) == 0:
        call |= draw(_tall_input(case.draw()))
    if name.endswith("_backward"):
        shape = (len(call["input"]), len(call["weight"]), *call["offset"].shape[2:])
        call["grad_output"] = torch.randn(shape).to(call["input"].dtype)
        call["output_mask"] = draw(st.lists(st.booleans(), min_size=5, max_size=5))
        del call["bias"]
    return call


@st.composite
def _tall_input(draw: st.DrawFn, call: dict[str, Any]) -> dict[str, Any]:
    """Draws an input of huge height, all of whose rows are one, with an output of a few rows."""
    height = draw(st.sampled_from((2**31 - 1, 2**31, 2**30)))
    stride, rows = height // 2, (height - 1) // (height // 2) + 1
    input = torch.randn(1, 2, 1, 1).expand(1, 2, height, 1)
    offset = torch.full((1, 2, rows, 1), draw(st.sampled_from((0.5, -1e9, 2e9))))
    geometry = {"stride": (stride, 1), "padding": (0, 0), "dilation": (1, 1)}
    weight = torch.randn(4, 2, 1, 1)
    mask = None if call["mask"] is None else torch.ones(1, 1, rows, 1)
    bias = None if call["bias"] is None else torch.ones(4)
    return dict(input=input, offset=offset, weight=weight, mask=mask, bias=bias, **geometry)


@st.composite
def _roi_arguments(draw: st.DrawFn, name: str) -> dict[str, Any]:
    case: RoiCase = draw(roi_cases())
    call = case.to_ps(cast(case.draw(dtype=draw(_dtypes)), draw(_dtypes), ["boxes", "offset"]))
    group, output = call["group_size"], call["output_size"]
    if name.endswith("_backward"):
        channels = call["input"].shape[1] // (group[0] * group[1])
        shape = (len(call["boxes"]), channels, *output)
        call["grad_output"] = torch.randn(shape).to(call["input"].dtype)
        call["output_mask"] = draw(st.lists(st.booleans(), min_size=2, max_size=2))
    elif name in ROI_FUNCTIONS:
        left_out = {
            "roi_pool": ("offset", "gamma", "part_size", "group_size"),
            "ps_roi_pool": ("offset", "gamma", "part_size"),
            "deform_roi_pool": ("part_size", "group_size"),
            "deform_ps_roi_pool": (),
        }[name]
        call = {key: value for key, value in call.items() if key not in left_out}
        if draw(st.booleans()):  # the boxes of each image in a list
            rows = call["boxes"]
            images = range(draw(st.integers(1, 4)))
            call["boxes"] = [rows[rows[:, 0] == image, 1:] for image in images]
    return call


_dtypes = st.sampled_from(DTYPES)
_sizes = st.one_of(st.integers(-1, 9), st.sampled_from(INTEGERS))
_size_pairs = st.one_of(_sizes, st.lists(_sizes, max_size=3), st.none(), st.floats())
_numbers = st.one_of(st.floats(), st.sampled_from(VALUES), _sizes, st.none())
_not_tensors = st.sampled_from((None, 1.5, True, "input", (), [], [1.0]))


@st.composite
def _changed(draw: st.DrawFn, key: str, value: Any) -> Any:
    """Draws another value of an argument."""
    if isinstance(value, Tensor):
        change = draw(st.sampled_from(_TENSOR_CHANGES))
        # The time of RoI pooling is linear in images and boxes, here 2**31 for one in memory.
        linear = change is _huge_size and key in ("input", "boxes")
        return draw(_layout(value) if linear else change(value))
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(_changed(key, value[index])), *value[index + 1 :]]
    if key == "mode":
        return draw(st.sampled_from(MODES))
    if key == "output_mask":
        return draw(st.lists(st.booleans(), min_size=len(value), max_size=len(value)))
    if key in ("spatial_scale", "gamma"):
        return draw(_numbers)
    if key == "sampling_ratio":  # 2**31 - 1 is valid, and takes minutes per bin
        return draw(_sizes.filter(lambda ratio: ratio != 2**31 - 1))
    return draw(_size_pairs) if isinstance(value, (tuple, list)) else draw(_not_tensors)


@st.composite
def _values(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    changed = tensor.to(torch.float64, copy=True).flatten()
    changed[draw(st.integers(0, 6)) :: draw(st.sampled_from((1, 5, 7)))] = draw(
        st.sampled_from(VALUES)
    )
    return changed.view_as(tensor).to(tensor.dtype)


@st.composite
def _rank(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    changes = (lambda t: t[0], lambda t: t[None], torch.flatten, torch.sum, lambda t: t[..., 0])
    return draw(st.sampled_from(changes))(tensor)


@st.composite
def _size(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis, size = draw(st.integers(0, tensor.dim() - 1)), draw(st.integers(0, 9))
    if tensor.shape[axis] == 0:
        return tensor.new_zeros(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    return tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])


@st.composite
def _huge_size(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis, shape = draw(st.integers(0, tensor.dim() - 1)), list(tensor.shape)
    shape[axis] = draw(st.sampled_from(HUGE))
    return tensor.narrow(axis, 0, 1).expand(shape)


@st.composite
def _layout(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    kind = draw(st.sampled_from((*FORMATS, "gaps", "sliced", "expanded", "axes", "overlapping")))
    if kind in FORMATS:
        return laid_out(tensor, kind)
    if kind == "axes":
        axes = st.integers(0, tensor.dim() - 1)
        return strides.transposed(tensor, draw(axes), draw(axes))
    if kind == "overlapping":
        steps = [draw(st.integers(0, 4)) for _ in tensor.shape]
        begin = draw(st.integers(0, 3))
        reach = sum(step * size for step, size in zip(steps, tensor.shape, strict=True))
        memory = torch.randn(begin + reach + 1, dtype=torch.float64).to(tensor.dtype)
        return memory.as_strided(tensor.shape, steps, begin)
    return getattr(strides, kind)(tensor)


@st.composite
def _dtype(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    return tensor.to(draw(st.sampled_from((*DTYPES, *OTHER_DTYPES))))


def _inference_tensor(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# Tensors of another kind.
_KINDS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.to("meta"),
    torch.nn.Parameter,
    lambda t: t.as_subclass(Labelled),
    torch._neg_view,
    _inference_tensor,
    lambda t: t.clone().requires_grad_() * 1,
    Tensor.to_sparse,
    lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(1),
    Tensor.to_mkldnn,
    lambda t: torch.nested.nested_tensor(list(t)),
    Tensor.numpy,
    Tensor.tolist,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
)


@st.composite
def _kind(draw: st.DrawFn, tensor: Tensor) -> Any:
    return draw(st.sampled_from(_KINDS))(tensor)


def _not_tensor(tensor: Tensor) -> st.SearchStrategy[Any]:
    return _not_tensors


# The likely ones more than once.
_TENSOR_CHANGES: tuple[Callable[[Tensor], st.SearchStrategy[Any]], ...] = (
    *(_values, _values, _values, _layout, _layout, _layout, _size, _size, _dtype),
    *(_rank, _huge_size, _kind, _not_tensor),
)


def _compare(name: str, test: Callable[..., None], arguments: dict[str, Any], *first: Any) -> Any:
    inner = test.hypothesis.inner_test
    return st.builds(
        lambda **values: Comparison(name, lambda: inner(*first, "cpu", **values)), **arguments
    )


def comparisons() -> st.SearchStrategy[Comparison]:
    """Draws calls that are compared with torchvision or with the reference."""
    import torchvision

    # A sum of few rounded terms may cancel out: the errors in half precision have no bound.
    exact = {"dtype": st.sampled_from((torch.float64, torch.float32))}
    conv = test_deform_conv2d_property.test_equals_torchvision_in_float64
    roi = test_roi_pool_property.test_equals_the_reference_in_float64
    conv_arguments = {**test_deform_conv2d_property.ARGUMENTS, **exact}
    return st.one_of(
        _compare("deform_conv2d", conv, conv_arguments, torchvision),
        _compare("deform_ps_roi_pool", roi, {**test_roi_pool_property.ARGUMENTS, **exact}),
    )
