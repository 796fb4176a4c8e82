# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Uses the ops in code that was written for other libraries. One module for each library."""
