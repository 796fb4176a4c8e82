# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Sampling locations, effective dilation, RoI bins and cost of deformable models."""

from .effective_dilation import AnnotatedImage, Dilation, effective_dilation
from .on_object_share import OnObjectShare, on_object_share
from .recording import RecordedLayer, Recording, deformable_layers, record
from .roi_bins import RoIBins, deformable_pools, nearest_roi, record_roi_bins
from .trace import Trace, position_at, trace

__all__ = [
    "AnnotatedImage",
    "Dilation",
    "OnObjectShare",
    "RecordedLayer",
    "Recording",
    "RoIBins",
    "Trace",
    "deformable_layers",
    "deformable_pools",
    "effective_dilation",
    "nearest_roi",
    "on_object_share",
    "position_at",
    "record",
    "record_roi_bins",
    "trace",
]
