# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The ops as functions. Needs PyTorch and nothing else."""

from . import _library

_library.load()

from .deform_conv2d import deform_conv2d  # noqa: E402  the ops must be loaded first

__all__ = ["deform_conv2d"]
