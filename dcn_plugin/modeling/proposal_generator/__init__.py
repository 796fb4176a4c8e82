# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Region proposals that know their class."""

from .category_rpn import CategoryDetector, CategoryRPN, CategoryRPNHead

__all__ = ["CategoryDetector", "CategoryRPN", "CategoryRPNHead"]
