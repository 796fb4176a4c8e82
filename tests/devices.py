# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Where the CUDA kernels run: on a GPU or, with DCN_CUDA_EMULATOR set, in the emulator.

DCN_CUDA_EMULATOR is the path of a build of tests/cuda_emulator. Then the CUDA kernels serve the ops
on CPU tensors, in this process and its subprocesses, so that tests that are marked `cuda` run on
CPU tensors. Tests that need a GPU itself are marked `gpu` too.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tests.cuda_emulator.library import Emulator

# cuBLAS reads it when it starts; without it PyTorch's deterministic algorithms reject every GEMM.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

EMULATOR = Emulator(Path(p)) if (p := os.environ.get("DCN_CUDA_EMULATOR")) else None
# The device of tensors that the CUDA kernels accept.
CUDA = "cpu" if EMULATOR else "cuda"


def kernels_of(device: str | torch.device) -> str:
    """Returns whose kernels serve tensors on this device: "cpu" or "cuda"."""
    return "cuda" if EMULATOR else torch.device(device).type
