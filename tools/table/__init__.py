# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The paper's tables: its figures, the runs of their rows, and what came of them."""
