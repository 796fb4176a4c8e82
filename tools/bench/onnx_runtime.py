# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution by ONNX Runtime, in a process of its own.

After a run, the threads of ONNX Runtime spin for tens of milliseconds in expectation of the next
one, and would take cores from whatever is timed next. That is part of its speed, so it is not
switched off: the second of two runs is timed, as for all, when threads are awake, and the process
does not answer before they sleep. Its threads and its allocator stay out of the process that times
the others.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .timing import SelfTimed, call_ms

OPSET, IR_VERSION = 22, 10  # both of ONNX 1.17; its default may be newer than ONNX Runtime's


def installed() -> bool:
    """Returns whether onnx is installed, and an ONNX Runtime that has DeformConv on the CPU."""
    try:
        metadata.version("onnx")
        major, minor = (int(n) for n in metadata.version("onnxruntime").split(".")[:2])
    except metadata.PackageNotFoundError:
        return False
    return (major, minor) >= (1, 25)


def runs(device: str, dtype: str) -> bool:
    """Returns whether it can run a layer: its DeformConv on the CPU is for float32."""
    return device == "cpu" and dtype == "float32" and installed()


@dataclass(frozen=True)
class OnnxRuntimeCall:
    """A layer with the arguments of torchvision's function, on the CPU. It has no backward pass."""

    args: tuple
    threads: int
    directions = ("forward",)

    def run(self, direction: str) -> tuple[Tensor]:
        """Loads the layer into the process; returns its output."""
        args = [a.detach().numpy() if isinstance(a, Tensor) else a for a in self.args]
        return (torch.from_numpy(process().submit(load, args, self.threads).result()),)

    def timed(self, direction: str) -> SelfTimed:
        """Loads the layer into the process; returns the function that times it there."""
        self.run(direction)
        return SelfTimed(lambda: process().submit(milliseconds).result())


@functools.cache
def process() -> ProcessPoolExecutor:
    """Returns the process, which starts with its first task and ends with this one."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's threads
    return ProcessPoolExecutor(max_workers=1, mp_context=context)


# Within the process: the layer that was loaded last.
layer: Callable[[], list] | None = None


def load(args: list[Any], threads: int) -> np.ndarray:
    """Keeps a layer for `milliseconds`, instead of the last one; returns its output."""
    global layer
    import onnxruntime

    input, offset, weight, _, *geometry, mask = args
    inputs = {"input": input, "offset": offset, **({} if mask is None else {"mask": mask})}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model(inputs, weight, *geometry), options, providers=["CPUExecutionProvider"]
    )
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in inputs.items()}
    # Unlike `run`, it does not copy the output.
    layer = functools.partial(session.run_with_ort_values, ["output"], values)
    return layer()[0].numpy()


def model(
    inputs: dict[str, np.ndarray], weight: np.ndarray, stride: int, padding: int, dilation: int
) -> bytes:
    """Returns the graph of a layer; its weight is a constant, which may be packed beforehand."""
    from onnx import TensorProto, helper, numpy_helper

    kernel = weight.shape[2:]
    node = helper.make_node(
        "DeformConv",
        # The fourth one is the bias.
        ["input", "weight", "offset", "", *(name for name in inputs if name == "mask")],
        ["output"],
        kernel_shape=kernel,
        strides=[stride] * 2,
        pads=[padding] * 4,
        dilations=[dilation] * 2,
        offset_group=inputs["offset"].shape[1] // (2 * kernel[0] * kernel[1]),
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return made.SerializeToString()


def milliseconds() -> float:
    """Times a run, then waits until the threads sleep."""
    found = call_ms(layer, "cpu")
    used = -1.0
    while time.process_time() - used > 1e-3:
        used = time.process_time()
        time.sleep(0.02)
    return found
