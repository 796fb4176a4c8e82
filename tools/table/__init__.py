# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Parts of tools/run_table.py."""
