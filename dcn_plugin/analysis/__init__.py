# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What deformable networks learnt: where they sample, and how far."""

from .dilation import AnnotatedImage, Dilation, effective_dilation
from .following import Share, share_on_objects
from .parts import Parts, deformable_pools, nearest_roi, record_parts
from .recording import Recording, Sampled, deformable_layers, record
from .sampling import Trace, cell_at, trace

__all__ = [
    "AnnotatedImage",
    "Dilation",
    "Parts",
    "Recording",
    "Sampled",
    "Share",
    "Trace",
    "cell_at",
    "deformable_layers",
    "deformable_pools",
    "effective_dilation",
    "nearest_roi",
    "record",
    "record_parts",
    "share_on_objects",
    "trace",
]
