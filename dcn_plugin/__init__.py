# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable Convolutional Networks for Detectron2.

Importing this package registers its models and data sets with Detectron2, if that is installed.
`ops` and `layers` only need PyTorch.
"""

import importlib.util
import warnings

from .config import add_dcn_config

__all__ = ["add_dcn_config", "layers", "ops"]

try:
    from . import layers, ops
except ImportError as error:  # not compiled yet: `python -m dcn_plugin.env` must still work
    warnings.warn(str(error), stacklevel=2)
else:
    if importlib.util.find_spec("detectron2") is not None:
        try:
            importlib.import_module("detectron2.modeling")
        except Exception as error:  # a broken Detectron2: ops and layers work without it
            warnings.warn(f"dcn_plugin: no models: Detectron2 failed with {error!r}", stacklevel=2)
        else:
            importlib.import_module(".modeling", __name__)  # only registration
            importlib.import_module(".data", __name__)
