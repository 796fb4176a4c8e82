# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The parts of the benchmark: what is timed, how, and how it is told."""
