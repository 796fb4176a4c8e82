# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware RPN, as a proposal generator and as a detector."""

from .category_detector import CategoryDetector
from .category_rpn import CategoryRPN, CategoryRPNHead

__all__ = ["CategoryDetector", "CategoryRPN", "CategoryRPNHead"]
