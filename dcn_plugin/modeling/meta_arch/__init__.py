# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Meta-architectures."""

from .category_aware_rpn import CategoryAwareRPN
from .deeplab import DeepLab, DeepLabHead
from .rfcn import RFCN

__all__ = ["RFCN", "CategoryAwareRPN", "DeepLab", "DeepLabHead"]
