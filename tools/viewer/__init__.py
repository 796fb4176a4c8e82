# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Helpers of tools/visualize.py and tools/demo.py: input images, predictor and drawing."""
