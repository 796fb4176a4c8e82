# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution and deformable RoI pooling as functions. Requires PyTorch only."""

from .. import _library

_library.load()

from .deform_conv2d import deform_conv2d  # noqa: E402  the library must be loaded first
from .roi_pool import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_pool  # noqa: E402

__all__ = ["deform_conv2d", "deform_ps_roi_pool", "deform_roi_pool", "ps_roi_pool", "roi_pool"]
