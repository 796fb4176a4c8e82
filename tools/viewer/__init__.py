# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The parts of tools/visualize.py: what is looked at, by which network, and how it is drawn."""
