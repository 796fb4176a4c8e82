# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shapes: a generated data set whose classes differ in the arrangement of their parts."""

from .classes import NAMES
from .registration import register_set, register_shapes
from .sets import SETS, SPLITS, Settings

__all__ = ["NAMES", "SETS", "SPLITS", "Settings", "register_set", "register_shapes"]
