# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Region proposals that know their class."""

from .category_detector import CategoryDetector
from .category_rpn import CategoryRPN, CategoryRPNHead

__all__ = ["CategoryDetector", "CategoryRPN", "CategoryRPNHead"]
