# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What deformable networks learnt: where they sample, and how far."""

from .recording import Recording, Sampled, deformable_layers, record
from .sampling import Trace, cell_at, trace

__all__ = [
    "Recording",
    "Sampled",
    "Trace",
    "cell_at",
    "deformable_layers",
    "record",
    "trace",
]
